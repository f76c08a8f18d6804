"""Holding checkpoints for clients' views, beside a device that takes its time."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.device.slabs import COPIES
from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.jobs.moving import Mover
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import AccessDenied, ArenaFull, RequestError, UnknownCheckpoint
from djinn_zmq.memory.arena import GRANULE
from djinn_zmq.settings import MIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.tensors import Tensor
from djinn_zmq.wire.tiers import Hold, Move
from tests.engine.keepers import IDS, LIMITS, OWNER, Late, ServerSide, running


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[Keeping]:
    device = Late()
    device.export = lambda slab: ("00", b"handle")
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, device, device_memory=4 * MIB) as keeping,
    ):
        yield keeping
        device.copies.clear()


@pytest.mark.parametrize("copy", [False, True])
def test_a_hold_that_is_given_up_before_it_was_told_of_ends(keeping: Keeping, copy: bool) -> None:
    device: Any = keeping.device
    data = torch.randn(2, 5, 8)
    kept = keeping.keep(data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
    device.finish()
    keeping.tiers.fill()
    slabs, used = keeping.room.slabs.slabs, keeping.pool.used
    session, model = EngineSession(1, OWNER, "tiny", asker=os.getpid()), object()
    _, turns = Mover(keeping, Runner(keeping)).hold(
        Hold(kept.id, "device", copy), (), session, model, Stopwatch(), shared=True
    )
    device.busy = True
    next(turns)
    assert keeping.holds.of(1)
    turns.close()  # as a client does that waits no longer
    assert not keeping.holds.of(1) and keeping.entries[kept.id].body.idle
    device.busy = False
    keeping.room.settle()
    assert sum(len(slab.leased) for slab in slabs.values()) == 1 and keeping.pool.used == used


def test_views_of_one_checkpoint_that_end_with_their_client_leave_no_descriptor(
    keeping: Keeping,
) -> None:
    device: Any = keeping.device
    data = torch.randn(2, 5, 8)
    kept = keeping.keep(data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
    device.finish()
    keeping.tiers.fill()
    before = len(os.listdir("/proc/self/fd"))
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    body = keeping.entries[kept.id].body
    for number in range(101, 106):
        keeping.holds.view(number, 1, body, client.pid)
    keeping.drop_session(1)
    client.communicate()
    keeping.room.settle()
    assert len(os.listdir("/proc/self/fd")) == before


def kept_in(keeping: Keeping, session: int = 1) -> Entry:
    device: Any = keeping.device
    kept = keeping.keep(torch.randn(2, 5, 8), session=session, owner=OWNER, run=7, layer=2, ids=IDS)
    device.finish()
    keeping.tiers.fill()
    return keeping.entries[kept.id]


def leased(keeping: Keeping) -> int:
    keeping.room.settle()
    return sum(len(slab.leased) for slab in keeping.room.slabs.slabs.values())


def test_a_slot_that_a_client_had_mapped_waits_for_its_end_for_who_reads_it_and_for_the_device(
    keeping: Keeping,
) -> None:
    device: Any = keeping.device
    entry = kept_in(keeping)
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    keeping.holds.view(101, 1, entry.body, client.pid)
    keeping.hold(entry)  # a run of another session patches from it
    keeping.drop_session(1)
    client.communicate()
    assert leased(keeping) == 1
    assert keeping.hidden(entry).nbytes == entry.body.nbytes
    device.busy = True
    keeping.let_go(entry)
    assert leased(keeping) == 1
    device.busy = False
    assert leased(keeping) == 0


def test_a_writable_slot_waits_for_its_client_for_who_reads_it_and_for_the_device(
    keeping: Keeping,
) -> None:
    device: Any = keeping.device
    entry = kept_in(keeping)
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    hold = keeping.holds.lend_copy(101, 1, entry.body, client.pid)
    assert hold.writable is not None
    tensor = Tensor(entry.body.dtype, entry.body.shape, hold.writable.where)
    done = keeping.holds.reading(tensor, OWNER)  # a resume in another session
    keeping.drop_session(1)
    assert leased(keeping) == 3  # with its spares
    client.communicate()
    assert leased(keeping) == 3
    device.busy = True
    done()
    assert leased(keeping) == 3
    device.busy = False
    assert leased(keeping) == 0


def test_who_wants_room_does_not_wait_for_a_client_to_end(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    keeping.holds.view(101, 1, entry.body, client.pid)
    keeping.drop_session(1)
    assert leased(keeping) == 1
    keeping.pool.lease(1, 9)
    turns = keeping.make_room(LIMITS.host_memory, OWNER)
    assert sum(1 for _ in zip(turns, range(100), strict=False)) < 100
    client.communicate()


def test_what_a_client_gives_back_or_its_engine_ends_with_leaves_no_descriptor_and_may_move(
    keeping: Keeping,
) -> None:
    entry = kept_in(keeping)
    before = len(os.listdir("/proc/self/fd"))
    keeping.holds.view(101, 1, entry.body, os.getpid())
    keeping.holds.lend_copy(102, 1, entry.body, os.getpid())
    keeping.drop([101, 102])
    assert len(os.listdir("/proc/self/fd")) == before
    assert not entry.body.views and entry.body.idle
    while keeping.room.slabs.lease(64, COPIES):
        pass
    entry.body.users += 1  # its own slot gives no way
    with pytest.raises(ArenaFull):
        keeping.holds.lend_copy(103, 1, entry.body, os.getpid())
    assert len(os.listdir("/proc/self/fd")) == before and not keeping.holds.of(1)
    keeping.holds.view(104, 1, entry.body, os.getpid())
    keeping.holds.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_slot_is_named_with_the_bytes_that_it_was_lent_for(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    hold = keeping.holds.lend_copy(101, 1, entry.body, os.getpid())
    assert hold.writable is not None
    for shape in ((2, 5, 9), (2, 5, 7)):
        with pytest.raises(RequestError, match="bytes in a device slot that was lent for 320"):
            keeping.holds.find(Tensor("float32", shape, hold.writable.where), OWNER)


def test_a_spare_that_gives_way_gives_its_room_in_host_memory_as_well(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    used = keeping.pool.used
    hold = keeping.holds.lend_copy(101, 1, entry.body, os.getpid())
    assert len(hold.spares) == 2
    taken = hold.spares[1].slot.where
    entry.body.users += 1
    while keeping.room.slabs.lease(64, COPIES):
        pass
    keeping.holds.lend_copy(102, 1, entry.body, os.getpid())
    assert len(hold.spares) == 1 and keeping.pool.used == used + GRANULE
    with pytest.raises(AccessDenied, match="was not lent to you"):  # it is another's by now
        keeping.holds.find(Tensor("float32", (2, 5, 8), taken), OWNER)


def test_a_view_in_host_memory_ends_with_its_session_and_waits_for_nobody(keeping: Keeping) -> None:
    entry, used = kept_in(keeping), keeping.pool.used
    keeping.holds.view(101, 1, entry.body)
    keeping.drop([entry.id])
    assert keeping.pool.used == used  # its client may still read it
    keeping.drop_session(1)
    assert (leased(keeping), keeping.pool.used) == (0, 0) and not keeping.holds.of(1)


def test_a_slot_that_a_client_had_mapped_waits_for_the_copy_that_is_made_of_it(
    keeping: Keeping,
) -> None:
    device: Any = keeping.device
    kept = keeping.keep(torch.randn(2, 5, 8), session=1, owner=OWNER, run=7, layer=2, ids=IDS)
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    keeping.holds.view(101, 1, keeping.entries[kept.id].body, client.pid)
    keeping.drop_session(1)
    client.communicate()
    assert leased(keeping) == 1
    device.finish()
    assert leased(keeping) == 0


# ---- what may be asked


def asking(keeping: Keeping, session: EngineSession, what: str, asked: Any) -> Any:
    """The job that *asked* comes to, done."""
    mover, model = Mover(keeping, Runner(keeping)), object()
    begin = getattr(mover, what)
    job, turns = begin(asked, (), session, model, Stopwatch(), shared=True)
    for _ in turns:
        pass
    return job


def test_a_checkpoint_is_moved_where_there_is_such_a_tier_and_up_to_the_fastest(
    keeping: Keeping,
) -> None:
    session = EngineSession(1, OWNER, "tiny")
    one, two = kept_in(keeping), kept_in(keeping)
    ids = (one.id, two.id, one.id)
    job = asking(keeping, session, "move", Move(ids, "host", True))
    assert [kept.tiers for kept in job.reply().kept] == [("host",), ("host",)]
    job = asking(keeping, session, "move", Move(ids[:2], "", False))
    assert [kept.tiers for kept in job.reply().kept] == [("device", "host")] * 2
    for tier, down, allowed in (
        ("device", True, "evicted to nothing: host or disk"),
        ("", True, "evicted to nothing: host or disk"),
        ("disk", False, "prefetched to nothing: device or host"),
    ):
        with pytest.raises(RequestError, match=f'"{tier}" can be {allowed}'):
            asking(keeping, session, "move", Move(ids, tier, down))
    with pytest.raises(RequestError, match="no disk tier"):
        asking(keeping, session, "move", Move(ids, "disk", True))
    with pytest.raises(RequestError, match="no checkpoint to move is named"):
        asking(keeping, session, "move", Move((), "host", True))
    assert one.body.tiers == two.body.tiers == ("device", "host") and one.body.idle


def test_what_is_moved_or_held_is_a_checkpoint_of_the_session_that_asks(keeping: Keeping) -> None:
    session = EngineSession(1, OWNER, "tiny", asker=os.getpid())
    other = kept_in(keeping, session=2)
    data = torch.randn(2, 5, 8)
    logits = keeping.keep(data, session=1, owner=OWNER, run=7, layer=-1, ids=IDS)
    for number in (other.id, logits.id):
        for what, asked in (
            ("move", Move((number,), "host", True)),
            ("hold", Hold(number, "host", False)),
            ("hold", Hold(number, "device", False)),
        ):
            with pytest.raises(RequestError, match="is not a checkpoint of this session"):
                asking(keeping, session, what, asked)
    with pytest.raises(UnknownCheckpoint):
        asking(keeping, EngineSession(2, "you", "tiny"), "move", Move((other.id,), "host", True))
    assert other.body.tiers == ("device", "host")


def test_a_view_is_of_a_tier_that_there_is_and_of_the_device_for_a_process_that_is_known(
    keeping: Keeping,
) -> None:
    session, other = EngineSession(1, OWNER, "tiny"), kept_in(keeping)  # in front of it
    entry = kept_in(keeping)
    for tier, copy in (("disk", False), ("", False), ("host", True)):
        with pytest.raises(RequestError, match=f'"{tier}" cannot be held'):
            asking(keeping, session, "hold", Hold(entry.id, tier, copy))
    for copy in (False, True):
        with pytest.raises(RequestError, match="lent only to a client on this machine"):
            asking(keeping, session, "hold", Hold(entry.id, "device", copy))
    told = asking(keeping, session, "hold", Hold(entry.id, "host", False)).reply()
    assert told.tensor == entry.body.tensor and told.handle is None and entry.body.views == 1
    with pytest.raises(RequestError, match="a view of the checkpoint is in use"):
        asking(keeping, session, "move", Move((entry.id,), "host", True))
    keeping.drop([told.hold])
    session.asker = os.getpid()
    told = asking(keeping, session, "hold", Hold(entry.id, "device", False)).reply()
    assert entry.body.device is not None and told.tensor.where == entry.body.device.where
    assert told.handle.offset == told.tensor.where.index * GRANULE > 0 and told.spare is None
    lent = asking(keeping, session, "hold", Hold(entry.id, "device", True)).reply()
    assert lent.tensor.where not in (told.tensor.where, lent.spare) and lent.spare is not None
    slabs = keeping.room.slabs.slabs
    assert all(slabs[one.tensor.where.slab].exported for one in (told, lent))
    keeping.drop([told.hold, lent.hold, other.id])
    assert not entry.body.views and entry.body.idle and leased(keeping) == 1


def test_a_slab_that_cannot_be_opened_by_others_is_refused_and_nothing_is_held(
    keeping: Keeping,
) -> None:
    """As on a CPU."""

    def refuse(_: object) -> None:
        raise RequestError("there is no CUDA memory to open")

    device: Any = keeping.device
    device.export = refuse
    entry, session = kept_in(keeping), EngineSession(1, OWNER, "tiny", asker=os.getpid())
    used = leased(keeping), keeping.pool.used
    for copy in (False, True):
        with pytest.raises(RequestError, match="no CUDA memory"):
            asking(keeping, session, "hold", Hold(entry.id, "device", copy))
    assert not keeping.holds.of(1) and entry.body.idle
    assert (leased(keeping), keeping.pool.used) == used
