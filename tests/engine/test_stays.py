"""Resumes that stop where they begin, beside a device that takes its time."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine import stays
from djinn_zmq.engine.device.devices import Broken
from djinn_zmq.engine.device.slabs import COPIES
from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.holds import Hold
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.stays import WAKE_NS, Stays
from djinn_zmq.errors import AccessDenied, ArenaFull, Cancelled, EditError, OnDevice, StaleSlot
from djinn_zmq.settings import MIB
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.edits import Zero
from djinn_zmq.wire.messages import Resume, Wanted
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Device, Inline, Slot, Tensor
from tests.engine.keepers import IDS, OWNER, Late, ServerSide, running

LONG = 1e9  # nanoseconds that a copy took for each byte
STAY = Wanted(2, (), "none", 0)


class Engine:
    """What of an engine a stay needs; asked, told and answered in lists."""

    def __init__(self, keeping: Keeping, device: Late) -> None:
        self.keeping, self.device = keeping, device
        self.session = EngineSession(1, OWNER, "tiny")
        self.said: list[tuple[Any, ...]] = []
        self.rung: list[bytes] = []  # whose client was woken for what is about to be said
        answers: Any = SimpleNamespace(
            soon=self.rung.append,
            rehearse=lambda: None,
            answer=lambda envelope, header, reply, store: self.said.append((envelope, reply)),
            refuse=lambda envelope, header, error: self.said.append((envelope, error)),
            tell=lambda op, meta, session: self.said.append((op, meta)),
        )
        telling: Any = SimpleNamespace(kept=lambda ids, kept, _: self.said.append(("kept", kept)))
        self.stays = Stays(keeping, answers, telling, self._failed)
        self.data = torch.randn(2, 5, 8)
        kept = keeping.keep(self.data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
        self.point = kept.id

    def _failed(self, error: Exception) -> None:
        """The device goes on working."""

    def ask(
        self, *, hidden: Any = None, wanted: Wanted = STAY, envelope: bytes = b"a", **more: Any
    ):
        placed = None
        if isinstance(hidden, (Device, Slot)):
            placed = Tensor("float32", (2, 5, 8), hidden)
        elif hidden is not None:
            raw = hidden.numpy().tobytes()
            placed = Tensor("float32", tuple(hidden.shape), Inline(raw))
        meta = Resume(self.point, placed, more.get("edits", ()), wanted)
        header = Header(b"DJ", 1, Op.RESUME, 0, 0, 5, self.session.id, 0, 0)
        return self.stays.begin(meta, (), self.session, envelope, header, 0)


@pytest.fixture
def engine(server: ServerSide) -> Iterator[Engine]:
    device = Late()
    with running(server, device, device_memory=4 * MIB) as keeping:
        engine = Engine(keeping, device)
        device.finish()
        keeping.tiers.fill()
        yield engine
        device.copies.clear()


def test_what_is_where_layers_read_it_is_answered_at_once_and_told_of_first(engine: Engine) -> None:
    assert engine.ask()
    (told, kept), (envelope, reply) = engine.said
    assert (told, envelope) == ("kept", b"a") and engine.rung == [b"a"]
    assert reply.checkpoints == kept and (reply.state, reply.layer) == ("stopped", 2)
    assert same_bits(engine.keeping.load(kept[0].tensor), engine.data)
    assert not engine.stays


def test_what_waits_for_no_copy_looks_at_the_clock_for_its_span_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def clock() -> int:
        looked.append(1)
        return 7

    monkeypatch.setattr(stays, "time", SimpleNamespace(perf_counter_ns=clock))
    assert engine.ask() and len(looked) == 1
    assert engine.said[-1][1].spans == (("restore", 7),)


def test_what_is_sent_in_its_place_is_answered_when_the_device_has_it(engine: Engine) -> None:
    engine.device.busy = True
    engine.stays._ns_a_byte = LONG
    sent = torch.randn(2, 5, 8)
    assert engine.ask(hidden=sent)
    engine.stays.answer()
    assert engine.stays and [one[0] for one in engine.said] == ["kept"]
    assert not engine.rung  # that is long before the answer
    engine.device.busy = False
    engine.stays.answer()
    assert engine.rung == [b"a"]
    assert not engine.stays and engine.said[-1][1].state == "stopped"
    engine.device.finish()
    engine.keeping.tiers.fill()
    assert same_bits(engine.keeping.load(engine.said[-1][1].checkpoints[0].tensor), sent)


def test_what_was_sent_and_is_released_while_it_is_copied_comes_to_nothing(
    engine: Engine, server: ServerSide
) -> None:
    slot = server.foreign(torch.ones(2, 5, 8).numpy().tobytes())
    engine.device.busy = True
    assert engine.ask(hidden=slot)
    server.arenas.staging(OWNER).give_back(slot)
    engine.device.busy = False
    engine.stays.answer()
    (_, (kept,)), (op, drop), (_, error) = engine.said
    assert (op, drop.ids, kept.id in engine.keeping.entries) == (Op.DROP, (kept.id,), False)
    assert isinstance(error, StaleSlot) and "released before it was answered" in str(error)
    assert engine.ask(hidden=server.foreign(torch.ones(2, 5, 8).numpy().tobytes()))
    assert engine.said[-1][1].state == "stopped"


@pytest.mark.parametrize("where", ["sent", "host"])
def test_who_waits_for_a_copy_is_woken_once_and_when_it_has_taken_nearly_as_long_as_the_last_one(
    engine: Engine, where: str
) -> None:
    sent = engine.data if where == "sent" else None
    body = engine.keeping.entries[engine.point].body
    if sent is None:
        engine.device.reads_host = False
        list(engine.keeping.tiers.evict(body, "host"))
    engine.device.busy = True
    engine.stays._ns_a_byte = LONG
    assert engine.ask(hidden=sent)
    engine.stays.answer()
    assert not engine.rung
    engine.stays._ns_a_byte = WAKE_NS / body.nbytes
    for _ in range(2):
        engine.stays.answer()
        assert engine.rung == [b"a"] and [one[0] for one in engine.said] == ["kept"]
    engine.device.busy = False
    engine.stays.answer()
    assert engine.rung == [b"a"] and engine.said[-1][1].state == "stopped"
    assert 0 < engine.stays._ns_a_byte < LONG  # of this one


def test_who_asks_again_meanwhile_is_the_one_who_is_answered_and_once(engine: Engine) -> None:
    engine.device.busy = True
    assert engine.ask(hidden=engine.data) and engine.ask(hidden=engine.data, envelope=b"b")
    engine.device.busy = False
    engine.stays.answer()
    assert [one[0] for one in engine.said] == ["kept", b"b"]


def test_a_session_that_ends_meanwhile_is_told_so_and_nothing_is_kept(engine: Engine) -> None:
    before = sorted(engine.keeping.entries)
    engine.device.busy = True
    assert engine.ask(hidden=engine.data)
    engine.stays.end(1, Cancelled("its session was closed"))
    (_, kept), (op, drop), (envelope, error) = engine.said
    assert envelope == b"a" and isinstance(error, Cancelled) and not engine.stays
    assert op == Op.DROP and drop.ids == (kept[0].id,)
    assert sorted(engine.keeping.entries) == before


def test_a_device_that_is_of_no_use_after_an_error_ends_the_engine(engine: Engine) -> None:
    def fails() -> bool:
        raise RuntimeError("CUDA error")

    def broken(error: Exception) -> None:
        raise Broken("its context is poisoned") from error

    engine.device.computed = lambda: fails
    engine.stays._failed = broken
    with pytest.raises(Broken):
        engine.ask(hidden=engine.data)


def test_a_device_that_fails_meanwhile_is_an_error_of_that_request(engine: Engine) -> None:
    def fails() -> bool:
        raise RuntimeError("CUDA error")

    before = sorted(engine.keeping.entries)
    engine.device.computed = lambda: fails
    assert engine.ask(hidden=engine.data)
    (_, kept), (op, drop), (_, error) = engine.said
    assert "RuntimeError: CUDA error" in str(error) and not engine.stays
    assert op == Op.DROP and drop.ids == (kept[0].id,)
    assert sorted(engine.keeping.entries) == before


def test_an_array_of_another_shape_is_refused_and_nothing_is_kept(engine: Engine) -> None:
    before = sorted(engine.keeping.entries)
    with pytest.raises(EditError, match="hidden has shape"):
        engine.ask(hidden=torch.zeros(2, 5, 4))
    assert sorted(engine.keeping.entries) == before and not engine.said


@pytest.mark.parametrize(
    ("wanted", "edits"),
    [
        (Wanted(3, (), "none", 0), ()),
        (Wanted(2, (2,), "none", 0), ()),
        (Wanted(2, (), "top", 5), ()),
        (STAY, (Zero(()),)),
    ],
)
def test_what_has_more_to_do_is_a_job(engine: Engine, wanted: Wanted, edits: Any) -> None:
    assert not engine.ask(wanted=wanted, edits=edits)
    assert not engine.said


def test_a_debuggers_session_is_served_by_jobs_alone(engine: Engine) -> None:
    engine.session.attached = SimpleNamespace()
    assert not engine.ask()


# ---- spares


@pytest.fixture
def hold(engine: Engine) -> Hold:
    body = engine.keeping.entries[engine.point].body
    return engine.keeping.holds.lend_copy(99, 1, body, os.getpid())


def put(engine: Engine, where: Device | None, data: torch.Tensor) -> Device:
    """As a client that has mapped the slab does."""
    assert where is not None
    hold = engine.keeping.holds._lent[where]
    slot = next(one for one in hold.slots if one.where == where)
    slot.data.view(torch.float32).reshape(data.shape).copy_(data)
    return where


def test_what_is_put_into_a_spare_becomes_the_checkpoint_at_once_and_where_it_is(
    engine: Engine, hold: Hold
) -> None:
    sent = torch.randn(2, 5, 8)
    spare = put(engine, hold.spare, sent)
    engine.device.busy = True  # whatever it does, nobody waits for it
    assert engine.ask(hidden=spare)
    reply = engine.said[-1][1]
    entry = engine.keeping.entries[reply.checkpoints[0].id]
    assert entry.body.device is not None and entry.body.device.where == spare
    assert same_bits(engine.keeping.hidden(entry), sent)
    assert reply.spare == hold.spare not in (None, spare)


def test_a_spare_with_a_host_slot_of_its_own_needs_no_room(engine: Engine, hold: Hold) -> None:
    keeping = engine.keeping
    assert all(spare.lease is not None for spare in hold.spares)
    while keeping.fits(64, OWNER):
        keeping.pool.lease(64, 9)
    sent = torch.randn(2, 5, 8)
    assert engine.ask(hidden=put(engine, hold.spare, sent))
    entry = keeping.entries[engine.said[-1][1].checkpoints[0].id]
    assert same_bits(keeping.hidden(entry), sent)
    assert not engine.ask(hidden=sent)  # what has none is a job, which waits for room


def test_what_the_device_has_no_room_for_is_a_job_and_is_not_copied_to_it_before(
    engine: Engine,
) -> None:
    keeping, device = engine.keeping, engine.device
    body = keeping.entries[engine.point].body
    list(keeping.tiers.evict(body, "host"))
    device.reads_host = False
    while keeping.room.slabs.lease(64):
        pass
    seen = []
    device.see = lambda *what: seen.append(what)  # on a GPU that is a copy
    assert not engine.ask() and not seen and body.tiers == ("host",)


def test_its_copy_to_host_memory_is_begun_behind_the_answer(engine: Engine, hold: Hold) -> None:
    sent = torch.randn(2, 5, 8)
    assert engine.ask(hidden=put(engine, hold.spare, sent))
    (kept,) = engine.said[-1][1].checkpoints
    assert kept.tiers == ("device", "host") and not engine.device.copies
    with pytest.raises(OnDevice):
        engine.keeping.load(kept.tensor)
    engine.keeping.tiers.fill()
    engine.device.finish()
    engine.keeping.tiers.fill()
    assert same_bits(engine.keeping.load(kept.tensor), sent)


def test_each_answer_names_the_next_spare_and_all_slots_come_back(
    engine: Engine, hold: Hold
) -> None:
    slabs, pool, kept, spare = engine.keeping.room.slabs, engine.keeping.pool, {}, hold.spare
    before = slabs.used, pool.used
    for value in range(5):
        data = torch.full((2, 5, 8), float(value))
        assert engine.ask(hidden=put(engine, spare, data))
        reply = engine.said[-1][1]
        kept[reply.checkpoints[0].id], spare = data, reply.spare
    for number, data in kept.items():
        assert same_bits(engine.keeping.hidden(engine.keeping.entries[number]), data)
    engine.keeping.drop(list(kept))
    engine.keeping.tiers.fill()
    engine.device.finish()
    engine.keeping.room.settle()
    assert (slabs.used, pool.used) == before
    engine.keeping.drop([99])
    engine.keeping.room.settle()
    assert slabs.used < before[0] and pool.used < before[1] and not engine.keeping.holds._lent


def test_a_spare_is_given_away_once_and_by_its_own_owner(engine: Engine, hold: Hold) -> None:
    spare = hold.spare
    assert engine.ask(hidden=spare)
    with pytest.raises(AccessDenied, match="was not lent to you"):
        engine.ask(hidden=spare)
    hold.owner = "somebody else"
    with pytest.raises(AccessDenied, match="was not lent to you"):
        engine.ask(hidden=hold.spare)


def test_what_is_sent_as_the_writable_slot_is_copied_and_stays_the_clients(
    engine: Engine, hold: Hold
) -> None:
    assert hold.writable is not None
    assert engine.ask(hidden=put(engine, hold.writable.where, torch.ones(2, 5, 8)))
    kept = engine.keeping.entries[engine.said[-1][1].checkpoints[0].id]
    put(engine, hold.writable.where, torch.zeros(2, 5, 8))
    assert same_bits(engine.keeping.hidden(kept), torch.ones(2, 5, 8))


def test_where_the_slab_is_full_there_is_no_spare(engine: Engine, hold: Hold) -> None:
    slabs = engine.keeping.room.slabs
    assert hold.writable is not None
    taken = []
    while slot := slabs.lease_beside(hold.writable.where, 64):
        taken.append(slot)
    assert engine.ask(hidden=hold.spare) and engine.ask(hidden=hold.spare)
    assert hold.spare is None and engine.said[-1][1].spare is None
    slabs.give_back(taken.pop().where)
    assert engine.ask(hidden=hold.writable.where)  # as who has no spare does
    assert engine.said[-1][1].spare == hold.spare is not None


def test_slots_of_what_was_released_are_spares_again_when_the_device_is_done_with_them(
    engine: Engine, hold: Hold
) -> None:
    assert hold.writable is not None
    while engine.keeping.room.slabs.lease_beside(hold.writable.where, 64):
        pass
    for _ in range(5):
        assert engine.ask(hidden=hold.spare)
        reply = engine.said[-1][1]
        engine.keeping.drop([reply.checkpoints[0].id])
        assert reply.spare is not None
        engine.keeping.tiers.fill()
        engine.device.finish()


def test_what_goes_to_host_memory_alone_is_the_clients_to_change_once_it_is_answered(
    engine: Engine, hold: Hold
) -> None:
    assert hold.writable is not None
    engine.device.reads_host = False
    engine.keeping.entries[engine.point].body.users += 1  # what layers read gives no way
    while engine.keeping.room.slabs.lease(64):
        pass
    assert engine.ask(hidden=put(engine, hold.writable.where, torch.ones(2, 5, 8)))
    (kept,) = engine.said[-1][1].checkpoints
    assert kept.tiers == ("host",)
    put(engine, hold.writable.where, torch.zeros(2, 5, 8))  # before the copy is made
    engine.device.finish()
    engine.keeping.tiers.fill()
    assert same_bits(engine.keeping.load(kept.tensor), torch.ones(2, 5, 8))


def test_a_hold_that_ends_while_its_slot_is_copied_is_lent_no_more_spares(
    engine: Engine, hold: Hold
) -> None:
    assert hold.writable is not None
    engine.device.busy = True
    assert engine.ask(hidden=put(engine, hold.writable.where, torch.ones(2, 5, 8)))
    slabs = engine.keeping.room.slabs
    engine.keeping.drop([99])
    engine.keeping.room.settle()
    assert slabs.slabs[2].leased  # and its slots are not others' before that copy is made
    engine.device.busy = False
    engine.stays.answer()
    assert engine.said[-1][1].spare is None and not engine.keeping.holds._lent
    engine.keeping.room.settle()
    assert not slabs.slabs[2].leased


def test_what_is_kept_ready_for_spares_gives_way_to_what_is_wanted_now(
    engine: Engine, hold: Hold
) -> None:
    room, told, body = engine.keeping.room, hold.spare, engine.keeping.entries[engine.point].body
    body.users += 1  # as of a job that asks for a copy
    while room.slabs.lease(64, COPIES):
        pass
    another = engine.keeping.holds.lend_copy(100, 1, body, os.getpid())
    assert another.writable is not None and not another.spares and hold.spare == told
    with pytest.raises(ArenaFull):  # what a client may be writing into is its own
        engine.keeping.holds.lend_copy(101, 1, body, os.getpid())
    while engine.keeping.pool.ready(64):
        engine.keeping.pool.lease(64, 2)
    engine.keeping.pool.limit = engine.keeping.pool.mapped
    data = torch.ones(2, 5, 8)
    kept = engine.keeping.keep(data, session=1, owner=OWNER, run=8, layer=2, ids=IDS)
    assert "host" in kept.tiers and hold.spares[0].lease is None


def test_what_stands_in_a_spare_that_is_dropped_before_its_copy_is_begun_is_kept_until_that_is_done(
    engine: Engine, hold: Hold
) -> None:
    slabs, pool = engine.keeping.room.slabs, engine.keeping.pool
    assert engine.ask(hidden=hold.spare)
    before = slabs.used, pool.used
    engine.keeping.drop([engine.said[-1][1].checkpoints[0].id])
    engine.keeping.room.settle()
    assert (slabs.used, pool.used) == before
    engine.keeping.tiers.fill()
    engine.device.finish()
    engine.keeping.tiers.fill()
    assert slabs.used < before[0] and pool.used < before[1]


def test_a_spare_without_room_in_host_memory_is_copied_there_where_there_is_some_by_then(
    engine: Engine, hold: Hold
) -> None:
    while engine.keeping.holds.give_room():
        pass
    assert engine.ask(hidden=hold.spare)
    assert engine.said[-1][1].checkpoints[0].tiers == ("device", "host")


def test_what_is_another_sessions_or_needs_more_than_its_bytes_is_a_job(engine: Engine) -> None:
    entry = engine.keeping.entries[engine.point]
    entry.session = 2
    assert not engine.ask()
    entry.session, entry.place = 1, "layers.1.mlp"
    assert not engine.ask()
    entry.place, entry.past = "", 3
    assert not engine.ask()
    entry.past, entry.midway = 0, object()
    assert not engine.ask()
    entry.midway = None
    assert engine.ask()


def test_sessions_that_ask_under_the_same_number_wait_and_end_by_themselves(engine: Engine) -> None:
    engine.device.busy = True
    assert engine.ask(hidden=engine.data)
    engine.session = EngineSession(2, OWNER, "tiny")
    engine.keeping.entries[engine.point].session = 2
    assert engine.ask(hidden=engine.data, envelope=b"b")
    engine.stays.end(1, Cancelled("its session was closed"))
    engine.device.busy = False
    engine.stays.answer()
    assert [one[0] for one in engine.said] == ["kept", "kept", Op.DROP, b"a", b"b"]
    assert engine.said[-1][1].state == "stopped"
