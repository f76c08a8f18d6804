"""What gives way to what, and what is written in advance so that it can."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import ArenaFull
from djinn_zmq.settings import KIB, MIB
from tests.engine.keepers import IDS, OWNER, Late, ServerSide, in_turns, kept_in, running, used
from tests.engine.state.test_disk import disk_held


@pytest.fixture
def keeping(server: ServerSide, state: Path) -> Iterator[Keeping]:
    with running(server, device_memory=4 * MIB, state=state) as kept:
        yield kept


def gone_from_host(keeping: Keeping, entries: Sequence[Entry]) -> list[int]:
    """In which order *entries*, which have files, give way in host memory."""
    order = []
    while keeping.room._drop_one():
        order += [
            place
            for place, entry in enumerate(entries)
            if entry.body.host is None and place not in order
        ]
    return order


def test_what_was_used_last_gives_way_last_and_what_is_away_for_longest_first(
    keeping: Keeping,
) -> None:
    entries = [kept_in(keeping, session=session) for session in (1, 2, 3, 4, 5)]
    for entry in entries:
        in_turns(keeping.tiers.file(entry.body))
    room, tiers = keeping.room, keeping.tiers
    for session, expected_s in ((3, 100.0), (4, 200.0), (2, 300.0), (5, 400.0)):
        room.away(session, expected_s)
    room.expect(2)
    in_turns(tiers.back(2))
    keeping.room.forget_session(5)
    keeping.hold(entries[0])
    keeping.hidden(entries[0])
    keeping.let_go(entries[0])
    assert gone_from_host(keeping, entries) == [3, 2, 1, 4, 0]


def test_who_goes_away_again_before_anything_is_brought_up_is_away(keeping: Keeping) -> None:
    room = keeping.room
    kept_in(keeping, session=2)
    room.expect(2)
    coming = keeping.tiers.back(2)
    room.away(2, 100.0)
    in_turns(coming)
    assert room.is_away(2)


def test_what_somebody_uses_stays_and_what_a_thread_is_writing_is_not_written_twice(
    keeping: Keeping,
) -> None:
    entry, room = kept_in(keeping), keeping.room
    with disk_held(keeping.disk):
        assert room._write_one() and not room._write_one()
        filing = keeping.tiers.file(entry.body)
        next(filing)
    in_turns(filing)
    while room.slabs.lease(MIB, "another's"):
        pass
    keeping.hold(entry)
    assert not room._drop_one() and room.device_slot(MIB, entry.body.zone) is None
    assert entry.body.tiers == ("device", "host", "disk")
    evicting = keeping.tiers.evict(entry.body, "disk")
    next(evicting)
    keeping.let_go(entry)
    assert room.device_slot(MIB, entry.body.zone) is not None and room._drop_one()
    assert entry.body.tiers == ("disk",)
    in_turns(evicting)


def test_who_wants_room_waits_for_slots_that_the_device_is_done_with_soon(
    server: ServerSide,
) -> None:
    device = Late()
    with running(server, device) as keeping:
        kepts = [kept_in(keeping) for _ in range(3)]
        while keeping.pool.ready(KIB):
            keeping.pool.lease(KIB, 9)
        keeping.pool.limit = keeping.pool.mapped
        keeping.drop([kept.id for kept in kepts])
        waiting = keeping.make_room(kepts[0].body.nbytes, OWNER)
        next(waiting)
        device.finish()
        in_turns(waiting)
        assert keeping.fits(kepts[0].body.nbytes, OWNER)


def test_files_are_written_in_advance_when_host_memory_is_three_quarters_full(
    keeping: Keeping,
) -> None:
    entry = kept_in(keeping)
    limit = keeping.pool.limit
    keeping.pool.limit = keeping.pool.used * 4 // 3 + 1
    keeping.settle()
    assert not keeping.disk.used
    keeping.pool.limit -= KIB
    keeping.settle()
    assert keeping.disk.used == entry.body.nbytes
    in_turns(keeping.tiers.file(entry.body))
    assert [(one, how) for one, how, _ in keeping.moves] == [(entry, "write")]
    keeping.settle()  # all have one
    assert keeping.disk.used == entry.body.nbytes
    keeping.pool.limit = limit
    other = kept_in(keeping)
    keeping.room.drop_host(other.body)
    assert not keeping.room._write_one()  # there is nothing to make it of


def test_a_file_that_is_there_has_the_numbers_of_those_that_are_left_by_then(
    keeping: Keeping, state: Path
) -> None:
    entry = kept_in(keeping)
    with disk_held(keeping.disk):
        keeping.room._write_one()
        shared = keeping.entries[keeping.share(entry, 8).id]
        keeping.drop([entry.id])
        filing = keeping.tiers.file(shared.body)  # another wants it to have one
        next(filing)
    in_turns(filing)
    assert keeping.disk.used == shared.body.nbytes
    keeping.disk._writer.submit(int).result()
    assert [path.name for path in state.iterdir()] == [f"{shared.id:016x}.safetensors"]
    assert shared.body.disk == shared.id


def test_who_shares_what_is_being_written_has_a_file_as_well(keeping: Keeping, state: Path) -> None:
    entry = kept_in(keeping)
    with disk_held(keeping.disk):
        keeping.room._write_one()
        shared = keeping.share(entry, 8)
        filing = keeping.tiers.file(entry.body)
        next(filing)
    in_turns(filing)
    keeping.disk._writer.submit(int).result()
    names = sorted(f"{number:016x}.safetensors" for number in (entry.id, shared.id))
    assert sorted(path.name for path in state.iterdir()) == names


def test_what_is_released_while_its_file_is_written_leaves_nothing(
    keeping: Keeping, state: Path
) -> None:
    entry = kept_in(keeping)
    with disk_held(keeping.disk):
        keeping.room._write_one()
        keeping.drop([entry.id])
        assert used(keeping)[1:] == (entry.body.nbytes, entry.body.nbytes)  # the thread reads it
    keeping.disk._writer.submit(int).result()
    assert used(keeping) == (0, 0, 0)
    keeping.disk.close()
    assert not list(state.iterdir())


def test_nothing_gives_way_to_what_no_room_would_be_enough_for(keeping: Keeping) -> None:
    """In a slab or in the limit of host memory."""
    entry = kept_in(keeping)
    in_turns(keeping.tiers.file(entry.body))
    room = keeping.room
    while room.slabs.lease(MIB, "another's"):
        pass
    assert room.device_slot(MIB + 1, OWNER) is None
    too_much = keeping.pool.limit + 1
    in_turns(keeping.make_room(too_much, OWNER))
    with pytest.raises(ArenaFull):
        keeping.keep(
            torch.zeros(1, 1, too_much, dtype=torch.uint8),
            session=1, owner=OWNER, run=7, layer=2, ids=IDS,
        )  # fmt: skip
    assert entry.body.tiers == ("device", "host", "disk")
    room.slabs.slabs[entry.body.device.where.slab].exported = True
    assert room.device_slot(1, "another's") is None
    assert entry.body.tiers == ("device", "host", "disk")
    assert room.device_slot(MIB, entry.body.zone) is not None
    assert entry.body.tiers == ("host", "disk")


def test_each_that_shares_a_file_has_it_under_its_number_until_it_is_released(
    keeping: Keeping, state: Path
) -> None:
    entry = kept_in(keeping)
    in_turns(keeping.tiers.file(entry.body))
    shared = [keeping.share(entry, 8).id for _ in range(2)]
    keeping.room.drop_device(entry.body)
    keeping.room.drop_host(entry.body)

    def numbers() -> list[int]:
        keeping.disk._writer.submit(int).result()
        return sorted(int(path.stem, 16) for path in state.iterdir())

    assert numbers() == sorted([entry.id, *shared])
    keeping.drop([entry.id])
    assert numbers() == sorted(shared) and entry.body.disk in shared
    keeping.drop(shared)
    assert numbers() == [] and used(keeping) == (0, 0, 0)


def test_only_tiers_that_are_full_are_said_to_be(keeping: Keeping) -> None:
    body, room = kept_in(keeping).body, keeping.room
    host = ArenaFull("no room")
    assert (
        str(room.all_full(host, body)) == "no room; full as well: the device tier (limit 4.0 MiB)"
    )
    body.fixed = True  # as logits are, for which nothing else was asked
    assert str(room.all_full(host, body)) == "no room"
    keeping.disk.unclaimed = keeping.disk.limit
    full = "no room; full as well: the disk tier (limit "
    assert str(room.all_full(host, body)).startswith(full)
    keeping.disk.unclaimed = 0
