"""What an engine kept goes on in its successor, or is named lost."""

import errno
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.errors import ArenaFull, Lost, StaleSlot, StartError, UnknownCheckpoint
from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import Arena, OwnArena
from djinn_zmq.memory.files import FORMAT, path_of, write
from djinn_zmq.settings import KIB
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.tensors import Device, File, Slot, Tensor
from tests.engine.keepers import IDS, OWNER, ServerSide, end, keep, kib, running


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


def test_what_is_in_an_arena_that_cannot_be_mapped_is_named_lost_and_the_rest_is_taken(
    server: ServerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = server.engine()
    refused, good = keep(dead, kib(512, 1)), keep(dead, kib(512, 2))
    end(dead)
    with running(server) as keeping:
        with monkeypatch.context() as patch:
            patch.setattr(shared, "mapped", no_memory)
            assert keeping.adopt([refused], IDS, "me") == [refused.id]
        assert keeping.adopt([good], IDS, "me") == []
        assert same_bits(keeping.load(good.tensor), kib(512, 2))
        with pytest.raises(Lost, match="is gone"):
            keeping.load(refused.tensor)


def no_memory(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_what_was_adopted_and_released_is_not_adopted_again(server: ServerSide) -> None:
    dead = server.engine()
    kept = keep(dead, kib(16))
    end(dead)
    with running(server) as keeping:
        assert keeping.adopt([kept], IDS, OWNER) == []
        keeping.finish_adopting()
        keeping.drop([kept.id])
        assert keeping.adopt([kept], IDS, OWNER) == [kept.id]


def test_a_file_of_another_tensor_is_no_copy_and_that_of_its_own_counts(
    server: ServerSide, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    shape, nbytes = (2, 5, 8), 2 * 5 * 8 * 4
    facts = {"format": FORMAT, "layer": "2"}
    write(path_of(state, 9), {"hidden": np.ones(shape, np.float32), "ids": IDS}, facts)
    with running(server, state=state) as keeping:
        for dtype, extents in (("float32", (2, 5, 9)), ("int32", shape)):
            other = Kept(9, 1, 7, 2, Tensor(dtype, extents, File(9)), tiers=("disk",))
            assert keeping.adopt([other], IDS, OWNER) == [9]
        assert keeping.disk.used == 0
        own = Kept(9, 1, 7, 2, Tensor("float32", shape, File(9)), tiers=("disk",))
        assert keeping.adopt([own], IDS, OWNER) == [] and keeping.disk.used == nbytes
        keeping.drop([9])
        assert keeping.disk.used == 0
