"""What an engine keeps, with the server's own arenas at the other end of a real lease socket."""

import os
import select
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.models.caches import Account, Segment
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import LOCAL_OWNER, TORCH_DTYPES, Keeping
from djinn_zmq.engine.state.vault import Vault
from djinn_zmq.errors import (
    AccessDenied,
    ArenaFull,
    Lost,
    OnDevice,
    ProtocolError,
    StaleSlot,
    StartError,
    UnknownCheckpoint,
)
from djinn_zmq.memory.arena import GRANULE, Arena
from djinn_zmq.settings import KIB
from djinn_zmq.wire.messages import Granted, Join, Retire
from djinn_zmq.wire.tensors import Device, Frame, Inline, Slot, Tensor
from tests.engine.keepers import (
    ENGINE,
    IDS,
    LIMITS,
    OWNER,
    Late,
    ServerSide,
    end,
    keep,
    kib,
    running,
)


@pytest.fixture
def keeping(server: ServerSide) -> Iterator[Keeping]:
    with running(server) as kept:
        yield kept


def state_of(keeping: Keeping) -> tuple[int, int, list[int]]:
    return keeping.pool.used, keeping.pool.mapped, sorted(keeping.entries)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- in and out


def test_the_first_arena_is_there_before_anything_is_kept(keeping: Keeping) -> None:
    assert keeping.pool.mapped == LIMITS.arena and keeping.pool.used == 0


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_what_is_kept_comes_back_bit_for_bit(keeping: Keeping, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 5, 8 * 8), dtype=torch.uint8)
    data = raw.view(dtype)
    kept = keep(keeping, data)
    assert kept.tensor.shape == tuple(data.shape) and TORCH_DTYPES[kept.tensor.dtype] == dtype
    assert (kept.session, kept.run, kept.layer) == (1, 7, 2)
    assert same_bits(keeping.load(kept.tensor), data)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1), (2, 5, 8)])
def test_any_shape_is_kept_and_loaded(keeping: Keeping, shape: tuple[int, ...]) -> None:
    data = torch.randn(shape)
    assert same_bits(keeping.load(keep(keeping, data).tensor), data)


def test_a_strided_tensor_is_kept_by_its_values(keeping: Keeping) -> None:
    data = torch.randn(4, 6).T
    assert same_bits(keeping.load(keep(keeping, data).tensor), data.contiguous())


def test_what_is_kept_is_a_copy_and_what_is_loaded_another(keeping: Keeping) -> None:
    data = torch.randn(2, 5, 8)
    kept, before = keep(keeping, data), data.clone()
    data.zero_()
    loaded = keeping.load(kept.tensor)
    assert same_bits(loaded, before)
    loaded.zero_()
    assert same_bits(keeping.load(kept.tensor), before)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3)])
@pytest.mark.parametrize("framed", [False, True], ids=["inline", "frame"])
def test_tensors_in_a_message_are_loaded(
    keeping: Keeping, shape: tuple[int, ...], framed: bool
) -> None:
    data = torch.randn(shape).bfloat16()
    raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
    where = Frame(1) if framed else Inline(raw)
    loaded = keeping.load_sent(Tensor("bfloat16", shape, where), [b"other", raw], OWNER)
    assert same_bits(loaded, data)


def test_a_tensor_in_somebody_elses_arena_is_loaded(server: ServerSide, keeping: Keeping) -> None:
    data = torch.randn(3, 4)
    slot = server.foreign(data.numpy().tobytes())
    assert same_bits(keeping.load_sent(Tensor("float32", (3, 4), slot), (), OWNER), data)


def test_a_retired_arena_is_let_go_and_its_slots_are_lost(
    server: ServerSide, keeping: Keeping
) -> None:
    slot = server.foreign(b"12345678")
    tensor = Tensor("uint8", (8,), slot)
    keeping.load_sent(tensor, (), OWNER)
    with pytest.raises(Lost):  # answered after the server's thread is done with the one before
        keeping.load(Tensor("uint8", (8,), Slot(999, 0, 1)))
    before = open_descriptors()
    server.arenas.end_staging(OWNER)
    keeping.arenas.on_packet(Retire(slot.arena))
    assert open_descriptors() == before - 5  # two and a map of the server's, one and a map here
    with pytest.raises(Lost, match=f"arena {slot.arena} is gone"):
        keeping.load_sent(tensor, (), OWNER)


def test_news_of_arenas_never_seen_is_no_news(keeping: Keeping) -> None:
    keeping.arenas.on_packet(Retire(12345))
    keeping.arenas.on_packet(Granted(1))
    with pytest.raises(ProtocolError, match="Join is not for an engine"):
        keeping.arenas.on_packet(Join(b"token"))


# ---- what is refused


def test_an_arena_nobody_has_is_lost(keeping: Keeping) -> None:
    with pytest.raises(Lost, match="arena 999 is gone"):
        keeping.load(Tensor("uint8", (8,), Slot(999, 0, 1)))


def test_a_client_cannot_name_a_slot_where_checkpoints_are_kept(keeping: Keeping) -> None:
    kept = keep(keeping, torch.randn(2, 5, 8))
    with pytest.raises(AccessDenied):
        keeping.load_sent(kept.tensor, (), OWNER)


def test_a_client_cannot_name_a_slot_of_another_owners_upload(
    keeping: Keeping, server: ServerSide
) -> None:
    slot = server.foreign(b"somebody's")
    tensor = Tensor("uint8", (10,), slot)
    assert bytes(keeping.load_sent(tensor, (), OWNER).numpy()) == b"somebody's"
    with pytest.raises(AccessDenied, match="not yours"):
        keeping.load_sent(tensor, (), "key:somebody-else")


@pytest.mark.parametrize("nbytes", [GRANULE + 1, 1 << 43])
def test_a_slot_smaller_than_what_is_claimed_is_refused_before_that_is_allocated(
    server: ServerSide, keeping: Keeping, nbytes: int
) -> None:
    slot = server.foreign(b"12345678")
    with pytest.raises(ProtocolError, match=f"{nbytes} bytes of slot 0, which has {GRANULE}"):
        keeping.load_sent(Tensor("uint8", (nbytes,), slot), (), OWNER)


@pytest.mark.parametrize("index", [-1, 128, 1 << 40])
def test_a_slot_an_arena_does_not_have_is_refused(
    server: ServerSide, keeping: Keeping, index: int
) -> None:
    slot = server.foreign(b"12345678")
    with pytest.raises(ProtocolError, match=f"slot {index} of an arena"):
        keeping.load_sent(Tensor("uint8", (8,), Slot(slot.arena, index, 1)), (), OWNER)


def test_a_tensor_on_a_device_is_refused(keeping: Keeping) -> None:
    with pytest.raises(ProtocolError, match="device tensors are not in the message"):
        keeping.load(Tensor("uint8", (8,), Device(0, 0, 1)))


def test_a_kept_tensor_is_found_by_its_owner_alone(keeping: Keeping) -> None:
    kept = keep(keeping, torch.randn(2, 5, 8))
    assert keeping.find(kept.id, "me").kept == kept
    for number, owner in ((kept.id, "you"), (kept.id + 1, "me"), (0, "me")):
        with pytest.raises(UnknownCheckpoint, match=f"checkpoint {number:#x} does not exist or"):
            keeping.find(number, owner)


def test_a_dtype_that_no_tensor_has_takes_no_slot(keeping: Keeping) -> None:
    before = state_of(keeping)
    with pytest.raises(KeyError):
        keep(keeping, torch.zeros(4, dtype=torch.complex64))
    assert state_of(keeping) == before


def test_where_there_is_no_room_nothing_changes_and_sizes_are_told(keeping: Keeping) -> None:
    kepts = [keep(keeping, kib(384, number)) for number in range(4)]  # of 512 each
    before = state_of(keeping)
    with pytest.raises(ArenaFull) as refused:
        keep(keeping, kib(384))
    assert "384.0 KiB of host memory asked, 128.0 KiB free in one piece, 512.0 KiB free in" in str(
        refused.value
    )
    assert "limit 2.0 MiB" in str(refused.value)
    assert state_of(keeping) == before
    for number, kept in enumerate(kepts):
        assert same_bits(keeping.load(kept.tensor), kib(384, number))
    keep(keeping, kib(128))  # what does fit still goes in


def test_more_than_the_limit_never_fits(keeping: Keeping) -> None:
    before = state_of(keeping)
    with pytest.raises(
        ArenaFull,
        match="^4.0 MiB of host memory asked: the limit of all of it is 2.0 MiB; serve with more",
    ):
        keep(keeping, kib(4096))
    assert state_of(keeping) == before


class Failing(Late):
    """A device that cannot copy out, nor take notice of one more arena, where that is wanted."""

    reads_host = False
    fails = False

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().store(data, slot)

    def attach(self, arena: Arena) -> None:
        if self.fails:
            raise StartError("CUDA refuses to register an arena")


@pytest.mark.parametrize("device_memory", [None, 1024 * KIB])
def test_what_cannot_be_copied_takes_no_room(server: ServerSide, device_memory: int | None) -> None:
    device = Failing()
    with running(server, device, device_memory) as keeping:
        before = state_of(keeping), keeping.room.slabs.used
        device.fails, device.busy = True, True
        with pytest.raises(torch.OutOfMemoryError):
            keep(keeping, kib(64))
        device.busy = False  # with what it had begun of it
        keeping.settle()
        assert (state_of(keeping), keeping.room.slabs.used) == before


def test_an_arena_that_the_device_refuses_is_nobodys_and_what_is_there_is_kept_in(
    server: ServerSide,
) -> None:
    device = Failing()
    with running(server, device) as keeping:
        keep(keeping, kib(384))
        shared, state = server.arenas.nbytes(), state_of(keeping)
        device.fails = True
        for _ in keeping.make_room(384 * KIB, OWNER):  # one is made beside us, and comes to nothing
            pass
        assert state_of(keeping) == state and not keeping.fits(384 * KIB, OWNER)
        with pytest.raises(StartError):
            keep(keeping, kib(384))
        device.fails = False
        with pytest.raises(Lost):  # asked behind all that the server was told
            keeping.load(Tensor("uint8", (8,), Slot(999, 0, 1)))
        assert server.arenas.nbytes() == shared and state_of(keeping) == state


def test_room_that_could_not_be_made_is_not_wanted_for_ever(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Vault) -> Iterator[None]:
        raise RuntimeError("no way out")
        yield

    monkeypatch.setattr(Vault, "shrink", fails)
    vault = keeping.vault
    vault.limit = 1 << 20
    segment = Segment(0, 4, {("keys", None): torch.ones(1, 1, 4, 8)}, None, Account())
    known = vault.pin(1, [segment])
    vault.on_device -= segment.nbytes
    known[0][1].here = False  # as if it were in host memory
    before = vault._excess
    with pytest.raises(RuntimeError, match="no way out"):
        list(vault.ready(known))
    assert vault._excess == before


# ---- while the device still copies


def test_what_is_kept_can_be_told_of_before_its_copy_is_there_and_is_read_after(
    server: ServerSide,
) -> None:
    device, data = Late(), torch.randn(2, 5, 8)
    with running(server, device) as keeping:
        kept = keep(keeping, data)
        entry = keeping.find(kept.id, OWNER)
        with pytest.raises(OnDevice, match="is still being filled"):
            server.arenas.view(kept.tensor.where, kept.tensor.nbytes)
        assert not keeping.resident(entry)
        waiting = keeping.bring(entry)
        next(waiting)  # it waits for the copy
        device.finish()
        assert not list(waiting)
        assert keeping.resident(entry)
        assert same_bits(keeping.load(kept.tensor), data)
        assert (
            bytes(server.arenas.view(kept.tensor.where, kept.tensor.nbytes))
            == data.numpy().tobytes()
        )


def test_meanwhile_layers_take_it_from_the_device(server: ServerSide) -> None:
    device, data = Late(), torch.randn(2, 5, 8)
    with running(server, device, device_memory=1024 * KIB) as keeping:
        kept = keep(keeping, data)
        entry = keeping.find(kept.id, OWNER)
        assert keeping.ready(entry)
        keeping.hold(entry)
        assert same_bits(keeping.hidden(entry), data)
        keeping.let_go(entry)
        assert not entry.body.idle  # but it does not give way
        device.finish()
        keeping.tiers.fill()
        assert entry.body.idle
        assert same_bits(keeping.load(kept.tensor), data)


def test_what_was_not_copied_when_its_engine_ended_is_lost_and_its_room_free(
    server: ServerSide,
) -> None:
    device = Late()
    with running(server, device) as keeping:
        copied = keep(keeping, kib(8, 1))
        device.finish()
        keeping.tiers.fill()
        lost = keep(keeping, kib(8, 2))
        device.copies.clear()
    server.settle()
    with running(server) as successor:
        assert successor.adopt([copied, lost], IDS, OWNER) == [lost.id]
        successor.finish_adopting()
        assert same_bits(successor.load(copied.tensor), kib(8, 1))
        assert successor.pool.used == 8 * KIB


def test_an_arena_whose_last_copy_was_dropped_on_its_way_may_go_before_that_is_noted(
    server: ServerSide,
) -> None:
    device = Late()
    with running(server, device) as keeping:
        kepts = [keep(keeping, kib(450)) for _ in range(4)]
        keeping.drop([kept.id for kept in kepts])
        device.finish()
        keeping.room.settle()
        data = torch.randn(2, 5, 8)
        other = keeping.keep(data, session=2, owner=LOCAL_OWNER, run=7, layer=2, ids=IDS)
        assert (
            kepts[0].tensor.where.arena not in keeping.pool.arenas
        )  # another owner's has its room
        device.finish()
        keeping.tiers.fill()
        assert same_bits(keeping.load(other.tensor), data)


# ---- ends


def test_what_is_dropped_is_gone_and_its_room_free(keeping: Keeping) -> None:
    kepts = [keep(keeping, kib(8)) for _ in range(3)]
    keeping.drop([kepts[0].id, kepts[2].id, 12345])
    assert list(keeping.entries) == [kepts[1].id]
    assert keeping.pool.used == 8 * KIB
    with pytest.raises(StaleSlot):
        keeping.load(kepts[0].tensor)
    with pytest.raises(UnknownCheckpoint):
        keeping.find(kepts[0].id, "me")
    keeping.drop([kepts[0].id])  # a second time: nothing
    assert keeping.pool.used == 8 * KIB


def test_a_slot_that_is_used_again_is_stale_to_those_who_knew_it(keeping: Keeping) -> None:
    old = keep(keeping, kib(8, 1))
    keeping.drop([old.id])
    new = keep(keeping, kib(8, 2))
    assert new.tensor.where.index == old.tensor.where.index
    with pytest.raises(StaleSlot):
        keeping.load(old.tensor)
    assert same_bits(keeping.load(new.tensor), kib(8, 2))


def test_a_session_that_ends_leaves_nothing_and_the_others_all(keeping: Keeping) -> None:
    mine = [keep(keeping, kib(8), session=1, layer=layer) for layer in (0, 3, -1)]
    other = keep(keeping, kib(8, 5), session=2)
    keeping.drop_session(1)
    assert list(keeping.entries) == [other.id]
    assert keeping.pool.used == 8 * KIB
    for kept in mine:
        with pytest.raises(StaleSlot):
            keeping.load(kept.tensor)
    assert same_bits(keeping.load(other.tensor), kib(8, 5))
    keeping.drop_session(1)
    keeping.drop_session(2)
    assert state_of(keeping) == (0, LIMITS.arena, [])


def test_closing_closes_every_descriptor(server: ServerSide) -> None:
    slot = server.foreign(b"1")
    before = open_descriptors()
    keeping = server.engine()
    for _ in range(3):
        keep(keeping, kib(400))
    keeping.load_sent(Tensor("uint8", (1,), slot), (), OWNER)
    end(keeping)
    server.settle()
    server.arenas.retire(ENGINE)
    assert open_descriptors() == before


# ---- what is told of it, and asked


def test_a_file_says_what_it_is_not_enough_to_go_on_from_alone(
    server: ServerSide, tmp_path: Path
) -> None:
    """A server that finds it later would else have it resumed without, to other logits."""
    state = tmp_path / "state"
    state.mkdir()
    past = SimpleNamespace(branch=SimpleNamespace(ids=IDS[:1, :3]))
    with running(server, state=state) as keeping:
        for more, needs in (
            ({}, None),
            ({"midway": past}, "3 tokens' keys and values"),
            ({"place": "layers.2.mlp"}, "layers.2.mlp"),
        ):
            kept = keeping.keep(
                torch.ones(2, 5, 8), session=1, owner=OWNER, run=7, layer=2, ids=IDS, **more
            )
            for _ in keeping.tiers.file(keeping.entries[kept.id].body):
                pass
            assert keeping.disk.stored(kept.id).metadata.get("needs") == needs


def test_what_is_before_the_first_layer_is_moved_as_any_checkpoint_and_logits_are_not(
    keeping: Keeping,
) -> None:
    bodies = [keeping.entries[keep(keeping, kib(1), layer=layer).id].body for layer in (-1, 0, 1)]
    assert [body.idle for body in bodies] == [False, True, True]


def test_a_checkpoint_is_ready_where_layers_read_it_and_nothing_is_to_be_waited_for(
    server: ServerSide,
) -> None:
    class Apart(Cpu):
        """As a GPU is."""

        reads_host = False

    with running(server) as keeping:
        entry = keeping.entries[keep(keeping, kib(16)).id]
        assert keeping.ready(entry)
        assert not keeping.promote(entry) and keeping.vault.limit is None
        assert not keeping.vault.crowded
    with running(server, Apart()) as keeping:
        entry = keeping.entries[keep(keeping, kib(16)).id]
        assert not keeping.ready(entry) and not keeping.promote(entry)  # there is no room for it
    with running(server, Apart(), device_memory=1024 * KIB) as keeping:
        entry = keeping.entries[keep(keeping, kib(16)).id]
        assert keeping.ready(entry) and entry.body.tiers == ("device", "host")
        keeping.room.drop_device(entry.body)
        assert not keeping.ready(entry)
        assert keeping.promote(entry) and keeping.ready(entry)
        assert same_bits(keeping.hidden(entry), kib(16))
    device = Late()
    device.reads_host = False
    with running(server, device, device_memory=1024 * KIB) as keeping:
        entry = keeping.entries[keep(keeping, kib(16)).id]
        device.finish()
        keeping.tiers.fill()
        keeping.room.drop_device(entry.body)
        device.busy = True
        assert keeping.promote(entry) and not keeping.ready(entry)
        device.busy = False
        assert keeping.ready(entry)
        device.busy = True  # with what came since
        assert keeping.ready(entry)
        device.busy = False


def test_what_a_client_has_written_in_a_device_slot_is_seen_where_it_stands(
    server: ServerSide,
) -> None:
    with running(server, device_memory=4096 * KIB) as keeping:
        data = torch.randn(2, 5, 8)
        entry = keeping.entries[keep(keeping, data).id]
        slot = keeping.holds.lend_copy(101, 1, entry.body, os.getpid()).writable
        assert slot is not None
        sent = Tensor("float32", (2, 5, 8), slot.where)
        assert same_bits(keeping.see_sent(sent, (), OWNER), data)
        assert keeping.has(101, 1) and not keeping.has(101, 2) and not keeping.has(102, 1)
        assert keeping.has(entry.id, 1) and not keeping.has(entry.id, 2)
        with pytest.raises(AccessDenied):
            keeping.see_sent(sent, (), "you")


def test_who_has_been_told_of_what_was_done_beside_it_is_not_told_again(keeping: Keeping) -> None:
    poll = select.poll()
    poll.register(keeping, select.POLLIN)
    keeping._awake()
    assert poll.poll(0)
    keeping.settle()
    assert not poll.poll(0)
