"""What an engine kept goes on in its successor, or is named lost."""

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.devices import Cpu
from djinn_zmq.engine.stepping import same_bits
from djinn_zmq.errors import ArenaFull, Lost, StaleSlot, StartError, UnknownCheckpoint
from djinn_zmq.memory.arena import Arena, OwnArena
from djinn_zmq.settings import KIB
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.tensors import Device, Slot, Tensor
from tests.engine.keepers import IDS, ServerSide, end, keep, kib, running


def test_a_successor_takes_over_what_its_predecessor_kept(server: ServerSide) -> None:
    dead = server.engine()
    data = torch.randn(2, 5, 8)
    kept, more = keep(dead, data), keep(dead, kib(48, 9), session=2)
    end(dead)
    with running(server) as keeping:
        assert keeping.adopt([kept], IDS, "me") == []
        assert keeping.adopt([more], IDS, "you") == []
        assert same_bits(keeping.load(kept.tensor), data)
        entry = keeping.find(kept.id, "me")
        assert entry.kept == kept and (entry.ids == IDS).all()
        with pytest.raises(UnknownCheckpoint):
            keeping.find(more.id, "me")
        keeping.drop_session(1)
        with pytest.raises(StaleSlot):
            keeping.load(kept.tensor)
        assert same_bits(keeping.load(more.tensor), kib(48, 9))


def test_an_adopted_tensor_is_not_written_over(server: ServerSide) -> None:
    dead = server.engine()
    kept = keep(dead, kib(16, 1))
    end(dead)
    with running(server) as keeping:
        keeping.adopt([kept], IDS, "me")
        keeping.finish_adopting()
        with pytest.raises(ArenaFull):
            while True:
                keep(keeping, kib(64, 2))
        assert same_bits(keeping.load(kept.tensor), kib(16, 1))


def test_what_nobody_adopts_is_free_again(server: ServerSide) -> None:
    dead = server.engine()
    kept, unclaimed = keep(dead, kib(16)), keep(dead, kib(16))
    end(dead)
    with running(server) as keeping:
        keeping.adopt([kept], IDS, "me")
        assert keeping.pool.used == 32 * KIB
        keeping.finish_adopting()
        assert keeping.pool.used == 16 * KIB
        with pytest.raises(StaleSlot):
            keeping.load(unclaimed.tensor)


def test_what_cannot_be_adopted_is_named_lost_and_the_rest_is_taken(server: ServerSide) -> None:
    dead = server.engine()
    good, dropped = keep(dead, kib(16, 1)), keep(dead, kib(16, 2))
    dead.drop([dropped.id])
    end(dead)
    good_slot = good.tensor.where
    wheres = [Slot(999, 0, 1), Slot(good_slot.arena, 1 << 30, 1), Device(0, 0, 1)]
    others = [Kept(100 + n, 1, 7, 2, Tensor("uint8", (8,), w)) for n, w in enumerate(wheres)]
    too_large = Kept(200, 1, 7, 2, Tensor("uint8", (17 * KIB,), good_slot))
    with running(server) as keeping:
        lost = keeping.adopt([*others, too_large, good, dropped], IDS, "me")
        assert lost == [100, 101, 102, 200, dropped.id]
        assert list(keeping.entries) == [good.id]
        assert same_bits(keeping.load(good.tensor), kib(16, 1))


def test_what_is_in_an_arena_that_the_device_refuses_is_named_lost_and_the_rest_is_taken(
    server: ServerSide,
) -> None:
    class Choosing(Cpu):
        def attach(self, arena: Arena) -> None:
            if arena.number == refused.tensor.where.arena:
                raise StartError("CUDA refuses to register an arena")

    dead = server.engine()
    refused, good = keep(dead, kib(512, 1)), keep(dead, kib(512, 2))  # of an arena each
    end(dead)
    with running(server, Choosing()) as keeping:
        assert keeping.adopt([refused, good], IDS, "me") == [refused.id]
        assert same_bits(keeping.load(good.tensor), kib(512, 2))
        assert refused.tensor.where.arena not in keeping.pool.arenas
        with pytest.raises(Lost, match="is gone"):  # of the server's, too
            keeping.load(refused.tensor)


def test_a_successor_starts_also_where_its_predecessor_used_all_the_memory(
    server: ServerSide,
) -> None:
    dead = server.engine()
    kepts = [keep(dead, kib(512, number)) for number in range(4)]
    end(dead)
    with running(server) as keeping:
        assert keeping.adopt(kepts, IDS, "me") == []
        for number, kept in enumerate(kepts):
            assert same_bits(keeping.load(kept.tensor), kib(512, number))
        with pytest.raises(ArenaFull):
            keep(keeping, kib(1))
        keeping.drop([kepts[0].id])
        keep(keeping, kib(512))


def test_an_arena_of_a_dead_engine_is_leased_from_by_its_successor_alone(
    server: ServerSide,
) -> None:
    dead = server.engine()
    kept = keep(dead, kib(16))
    end(dead)
    with running(server) as keeping:
        keeping.adopt([kept], IDS, "me")
        arena = keeping.pool.arenas[kept.tensor.where.arena]
        assert isinstance(arena, OwnArena) and len(arena.leases) == 1
