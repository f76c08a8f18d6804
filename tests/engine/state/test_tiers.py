"""Checkpoints on their way between tiers, several at once, beside a disk that takes its time."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.jobs.moving import Mover
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import ArenaFull, BadFile, UnknownCheckpoint
from djinn_zmq.memory.files import path_of
from djinn_zmq.settings import KIB, MIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.tiers import Hold, Move
from tests.engine.keepers import (
    IDS,
    OWNER,
    Late,
    ServerSide,
    bits,
    brought,
    end,
    evicted,
    in_turns,
    kept_in,
    running,
    used,
)
from tests.engine.state.test_disk import disk_held


@pytest.fixture
def keeping(server: ServerSide, state: Path) -> Iterator[Keeping]:
    with running(server, device_memory=4 * MIB, state=state) as kept:
        yield kept


# ---- several at once


@pytest.mark.parametrize("begun", ["disk", "device"])
def test_what_two_bring_to_host_memory_at_once_takes_one_slot(keeping: Keeping, begun: str) -> None:
    entry = evicted(keeping, kept_in(keeping))
    if begun == "device":
        in_turns(brought(keeping, entry, "device"))
        keeping.room.drop_host(entry.body)
    while keeping.pool.ready(KIB):
        keeping.pool.lease(KIB, 9)  # both wait until one more arena is made
    before = keeping.pool.used
    in_turns(brought(keeping, entry, "host"), brought(keeping, entry, "host"))
    assert keeping.pool.used == before + entry.body.nbytes
    assert same_bits(keeping.load(entry.kept.tensor), bits())
    keeping.drop([entry.id])
    assert used(keeping) == (0, before, 0)


def test_a_file_whose_number_is_released_while_it_is_read_is_read_under_another(
    keeping: Keeping,
) -> None:
    entry = evicted(keeping, kept_in(keeping))
    shared = keeping.entries[keeping.share(entry, 8).id]
    bringing = brought(keeping, shared, "host")
    reads = threading.Event()
    keeping.disk._reader.submit(reads.wait, 10)
    next(bringing)
    keeping.drop([entry.id])
    keeping.disk._writer.submit(int).result()  # and its name is gone
    reads.set()
    in_turns(bringing)
    assert same_bits(keeping.load(shared.kept.tensor), bits())


def test_what_a_run_uses_is_read_from_its_file_though_it_is_released_meanwhile(
    keeping: Keeping, state: Path
) -> None:
    entry = evicted(keeping, kept_in(keeping))
    keeping.hold(entry)
    keeping.drop([entry.id])
    in_turns(keeping.tiers.bring(entry.body))
    assert same_bits(keeping.hidden(entry), bits())
    keeping.let_go(entry)
    assert used(keeping) == (0, 0, 0)
    keeping.disk.close()
    assert not list(state.iterdir())


def test_a_view_of_what_is_released_keeps_no_file_of_it(keeping: Keeping, state: Path) -> None:
    """It would come back with the next server."""
    entry = kept_in(keeping)
    in_turns(keeping.tiers.file(entry.body))
    keeping.holds.view(101, 1, entry.body)
    keeping.drop([entry.id])
    keeping.disk._writer.submit(int).result()
    assert not list(state.iterdir())
    keeping.drop([101])
    assert used(keeping) == (0, 0, 0)


# ---- what is released meanwhile


def mover(keeping: Keeping) -> Mover:
    return Mover(keeping, Runner(keeping))


@pytest.mark.parametrize(("tier", "down"), [("device", False), ("host", False), ("disk", True)])
def test_what_is_released_before_its_turn_to_be_moved_comes_takes_no_room(
    keeping: Keeping, tier: str, down: bool
) -> None:
    entries = [kept_in(keeping) for _ in range(2)]
    if not down:
        for entry in entries:
            evicted(keeping, entry)
    asked = Move(tuple(entry.id for entry in entries), tier, down)
    session, model = EngineSession(1, OWNER, "tiny"), object()
    _, turns = mover(keeping).move(asked, (), session, model, Stopwatch(), shared=True)
    with disk_held(keeping.disk):
        next(turns)
        keeping.drop([entries[1].id])
    with pytest.raises(UnknownCheckpoint):
        in_turns(turns)
    keeping.drop([entries[0].id])
    assert used(keeping) == (0, 0, 0)
    assert not keeping.disk.trouble


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("tier", "down"), [("host", False), ("disk", True)])
def test_what_is_released_behind_its_turn_in_it_or_before_is_named_and_the_others_are_moved(
    keeping: Keeping, tier: str, down: bool, place: int
) -> None:
    entries = [kept_in(keeping) for _ in range(3)]
    if not down:
        for entry in entries:
            evicted(keeping, entry)
    asked = Move(tuple(entry.id for entry in entries), tier, down)
    session, model = EngineSession(1, OWNER, "tiny"), object()
    _, turns = mover(keeping).move(asked, (), session, model, Stopwatch(), shared=True)
    while not entries[1].body.moving:
        next(turns)
    released = entries.pop(place)
    keeping.drop([released.id])
    with pytest.raises(UnknownCheckpoint, match=f"checkpoint {released.id:#x} does not exist"):
        in_turns(turns)
    assert all(tier in entry.body.tiers for entry in entries)


def test_what_is_released_while_it_waits_to_be_moved_takes_no_room(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    keeping.hold(entry)  # a run uses it
    moving = keeping.tiers.evict(entry.body, "disk")
    next(moving)
    keeping.drop([entry.id])
    keeping.let_go(entry)
    in_turns(moving)
    assert used(keeping) == (0, 0, 0) and not keeping.disk.trouble


def test_what_is_released_before_it_gets_its_file_gets_none(keeping: Keeping, state: Path) -> None:
    entry = kept_in(keeping)
    keeping.drop([entry.id])
    in_turns(keeping.tiers.file(entry.body))
    assert used(keeping) == (0, 0, 0) and not keeping.disk.trouble and not list(state.iterdir())


def test_what_is_released_before_it_is_lent_stays_for_whom_it_is_lent_to(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    session, model = EngineSession(1, OWNER, "tiny"), object()
    job, turns = mover(keeping).hold(
        Hold(entry.id, "host", False), (), session, model, Stopwatch(), shared=True
    )
    keeping.drop([entry.id])
    kept_in(keeping, 2)
    in_turns(turns)
    assert same_bits(keeping.load(job.reply().tensor), bits())
    keeping.drop([job.hold])
    assert keeping.pool.used == entry.body.nbytes  # the other's


# ---- hints


def test_logits_that_wait_for_their_client_stay_where_they_are(keeping: Keeping) -> None:
    logits = kept_in(keeping, layer=-1)
    in_turns(keeping.tiers.back(1))
    assert logits.body.tiers == ("host",)


# ---- a successor


def test_what_has_a_file_is_adopted_from_it_where_its_copy_in_host_memory_is_gone(
    server: ServerSide, state: Path
) -> None:
    dead = server.engine(device_memory=4 * MIB, state=state)
    entry = kept_in(dead)
    in_turns(dead.tiers.file(entry.body))
    told = entry.kept
    assert told.tiers == ("device", "host", "disk")
    dead.room.drop_host(entry.body)  # and it ends before that is told
    end(dead)
    with running(server, device_memory=4 * MIB, state=state) as keeping:
        assert keeping.adopt([told], IDS, OWNER) == []
        adopted = keeping.entries[told.id]
        assert adopted.body.tiers == ("disk",) and keeping.moves == [(adopted, "evict", 0)]
        in_turns(brought(keeping, adopted, "host"))
        assert same_bits(keeping.load(adopted.kept.tensor), bits())


# ---- files


def test_what_could_not_be_written_counts_for_nothing_and_is_not_tried_by_itself_again(
    keeping: Keeping, state: Path
) -> None:
    entry = kept_in(keeping)
    state.rmdir()
    with pytest.raises(ArenaFull, match="the file could not be written: .*No such file"):
        in_turns(keeping.tiers.evict(entry.body, "disk"))
    assert keeping.disk.used == 0 and entry.body.tiers == ("device", "host")
    assert not keeping.room._write_one()
    state.mkdir()


def test_a_full_disk_refuses_with_sizes(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    keeping.disk.unclaimed = keeping.disk.limit - entry.body.nbytes + 1
    with pytest.raises(ArenaFull, match="of disk asked"):
        in_turns(keeping.tiers.evict(entry.body, "disk"))
    assert not keeping.room._write_one()
    keeping.disk.unclaimed -= 1
    evicted(keeping, entry)


# ---- who gives up waiting


def test_room_that_was_taken_for_who_waits_no_longer_is_free_again(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = evicted(keeping, kept_in(keeping))
    with disk_held(keeping.disk):
        bringing = brought(keeping, entry, "host")
        next(bringing)
        bringing.close()
        assert used(keeping)[1] == entry.body.nbytes  # until the thread is through with it
    keeping.disk._reader.submit(int).result()
    assert used(keeping)[:2] == (0, 0)
    in_turns(brought(keeping, entry, "host"))
    done = threading.Event()
    monkeypatch.setattr(keeping.device, "filled", lambda: done.is_set)
    rising = brought(keeping, entry, "device")
    next(rising)
    rising.close()
    assert used(keeping)[0] == entry.body.nbytes  # until the device is
    done.set()
    assert used(keeping)[0] == 0
    in_turns(brought(keeping, entry, "device"), brought(keeping, entry, "device"))
    assert keeping.room.slabs.used == entry.body.nbytes


def test_a_slot_that_is_filled_when_its_body_has_left_it_is_no_news(server: ServerSide) -> None:
    device = Late()
    with running(server, device, device_memory=4 * MIB) as keeping:
        entry = kept_in(keeping)
        device.finish()
        assert keeping.room._drop_one()  # before that was noted
        keeping.tiers.fill()
        assert entry.body.tiers == ("device",) and not keeping.tiers.storing


def test_a_file_is_begun_when_the_copy_is_there_that_it_is_made_of(
    server: ServerSide, state: Path
) -> None:
    device = Late()
    with running(server, device, device_memory=4 * MIB, state=state) as keeping:
        entry = kept_in(keeping)
        filing = keeping.tiers.file(entry.body)
        next(filing)
        next(filing)
        assert not keeping.disk.used
        device.finish()
        in_turns(filing)
        evicted(keeping, entry)
        in_turns(brought(keeping, entry, "host"))
        assert same_bits(keeping.load(entry.kept.tensor), bits())


def test_where_no_tier_has_room_a_file_is_read_to_be_used_and_no_longer(
    server: ServerSide, state: Path
) -> None:
    with running(server, device_memory=0, state=state) as keeping:
        entry = evicted(keeping, kept_in(keeping))
        while keeping.pool.ready(KIB):
            keeping.pool.lease(KIB, 9)
        keeping.pool.limit = keeping.pool.mapped
        for _ in range(2):  # two runs
            keeping.hold(entry)
        in_turns(keeping.tiers.bring(entry.body), keeping.tiers.bring(entry.body))
        assert same_bits(keeping.hidden(entry), bits())
        keeping.let_go(entry)
        assert same_bits(keeping.hidden(entry), bits())
        keeping.let_go(entry)
        assert entry.body.scratch is None and not entry.body.resident


def test_what_is_released_while_a_session_comes_back_is_not_brought(keeping: Keeping) -> None:
    first, last = (evicted(keeping, kept_in(keeping), tier) for tier in ("host", "disk"))
    coming = keeping.tiers.back(1)
    with disk_held(keeping.disk):
        next(coming)
        keeping.drop([first.id])
    in_turns(coming)
    assert last.body.tiers == ("device", "host", "disk")
    keeping.drop([last.id])
    assert used(keeping) == (0, 0, 0)


def test_what_is_used_again_while_it_is_written_keeps_its_other_copies(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    moving = keeping.tiers.evict(entry.body, "disk")
    with disk_held(keeping.disk):
        next(moving)
        keeping.hold(entry)
    in_turns(moving)
    assert entry.body.tiers == ("device", "host", "disk")
    keeping.let_go(entry)


def test_what_is_on_the_device_alone_gets_a_file_as_well(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    keeping.room.drop_host(entry.body)
    in_turns(keeping.tiers.file(entry.body))
    assert entry.body.tiers == ("device", "host", "disk")


def test_what_is_released_while_it_is_evicted_leaves_nothing(keeping: Keeping) -> None:
    entry = kept_in(keeping)
    moving = keeping.tiers.evict(entry.body, "disk")
    with disk_held(keeping.disk):
        next(moving)
        keeping.drop([entry.id])
    in_turns(moving)
    assert used(keeping) == (0, 0, 0)


@pytest.mark.parametrize("down", [True, False])
def test_what_is_released_while_it_moves_is_named_as_gone_and_no_memory_is_blamed(
    server: ServerSide, state: Path, down: bool
) -> None:
    device = Late()
    with running(server, device, device_memory=4 * MIB, state=state) as keeping:
        entry = kept_in(keeping)
        device.finish()
        keeping.tiers.fill()
        if not down:
            evicted(keeping, entry)
        session, model = EngineSession(1, OWNER, "tiny"), object()
        asked = Move((entry.id,), "disk" if down else "host", down)
        _, turns = mover(keeping).move(asked, (), session, model, Stopwatch(), shared=True)
        if down:
            keeping.room.drop_host(entry.body)  # it is copied there first, which takes its time
        with disk_held(keeping.disk):
            next(turns)
            keeping.drop([entry.id])
        device.finish()
        with pytest.raises(UnknownCheckpoint):
            for _ in turns:
                device.finish()
        device.finish()
        keeping.tiers.fill()
        assert used(keeping) == (0, 0, 0) and not keeping.disk.trouble
    assert not list(state.iterdir())  # when the thread that removes has ended


def test_a_whole_file_of_another_checkpoint_in_the_place_of_its_own_is_refused(
    keeping: Keeping, state: Path
) -> None:
    one, two = (evicted(keeping, kept_in(keeping, value)) for value in (1, 2))
    path_of(state, two.id).replace(path_of(state, one.id))
    with pytest.raises(BadFile, match="another file than was written there"):
        in_turns(brought(keeping, one, "host"))
    keeping.settle()
    assert one.body.host is None and keeping.pool.used == 0


def test_a_file_of_another_layer_is_not_adopted_and_of_what_is_its_mark_is_known(
    server: ServerSide, state: Path
) -> None:
    with running(server, state=state) as keeping:
        entries = [evicted(keeping, kept_in(keeping, value, value)) for value in (1, 2, 3)]
        kepts = [entry.kept for entry in entries]
    server.settle()
    path_of(state, kepts[1].id).replace(path_of(state, kepts[0].id))
    with running(server, state=state) as keeping:
        assert keeping.adopt([kepts[0], kepts[2]], IDS, OWNER) == [kepts[0].id]
        last = keeping.entries[kepts[2].id]
        path_of(state, kepts[0].id).replace(path_of(state, last.id))
        with pytest.raises(BadFile, match="another file than was written there"):
            in_turns(brought(keeping, last, "host"))


def test_a_file_of_another_checkpoint_that_was_moved_while_no_engine_was_up_is_not_adopted(
    server: ServerSide, state: Path
) -> None:
    with running(server, state=state) as keeping:
        kepts = [evicted(keeping, kept_in(keeping, value)).kept for value in (1, 2, 3)]
    server.settle()
    path_of(state, kepts[1].id).replace(path_of(state, kepts[0].id))
    with running(server, state=state) as keeping:
        assert keeping.adopt([kepts[0], kepts[2]], IDS, OWNER) == [kepts[0].id]


def test_what_is_evicted_to_host_memory_is_there_though_it_has_a_file(keeping: Keeping) -> None:
    entry = evicted(keeping, kept_in(keeping))
    in_turns(brought(keeping, entry, "device"))
    keeping.room.drop_host(entry.body)
    in_turns(keeping.tiers.evict(entry.body, "host"))
    assert entry.body.tiers == ("host", "disk")
