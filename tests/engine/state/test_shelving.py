"""Files for what has none, before the server stops: the most recently used first, as far as time and room go."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.state import shelving
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.state.shelving import shelve
from djinn_zmq.settings import MIB
from djinn_zmq.wire.tiers import Shelve
from tests.engine.keepers import ServerSide, in_turns, kept_in, running


@pytest.fixture
def keeping(server: ServerSide, state: Path) -> Iterator[Keeping]:
    with running(server, device_memory=4 * MIB, state=state) as kept:
        yield kept


def shelved(keeping: Keeping, *ids: int, within_s: float = 60.0) -> dict[int, str]:
    """What is left, and why."""
    left: dict[int, str] = {}

    def work() -> Generator[None, None, None]:
        left.update((yield from shelve(keeping.room, keeping.tiers, Shelve(ids, within_s))))

    in_turns(work())
    return left


def test_what_is_named_gets_a_file_and_nothing_else(keeping: Keeping) -> None:
    entries = [kept_in(keeping) for _ in range(3)]
    shared = keeping.share(entries[0], 8)
    assert shelved(keeping, shared.id, entries[1].id, 4711) == {}
    assert ["disk" in entry.kept.tiers for entry in entries] == [True, True, False]
    keeping.disk._writer.submit(int).result()
    assert keeping.disk.stored(entries[0].id) and keeping.disk.stored(shared.id)


def test_what_was_used_last_is_written_first_and_what_has_no_room_is_named(
    keeping: Keeping,
) -> None:
    entries = [kept_in(keeping) for _ in range(4)]
    keeping.hold(entries[1])
    keeping.hidden(entries[1])  # used last, and still
    keeping.disk.limit = 2 * entries[0].body.nbytes
    left = shelved(keeping, *(entry.id for entry in entries))
    assert ["disk" in entry.kept.tiers for entry in entries] == [False, True, False, True]
    assert sorted(left) == [entries[0].id, entries[2].id]
    assert all("of disk asked" in why for why in left.values())
    keeping.let_go(entries[1])


def test_what_there_is_no_time_for_is_left_and_named_by_who_knows_that(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [kept_in(keeping) for _ in range(3)]
    now_s = iter(range(0, 1000, 10))
    monkeypatch.setattr(shelving.time, "monotonic", lambda: float(next(now_s)))
    steps: Any = [entry.id for entry in entries]
    assert shelved(keeping, *steps, within_s=25.0) == {}
    assert ["disk" in entry.kept.tiers for entry in entries] == [False, False, True]
