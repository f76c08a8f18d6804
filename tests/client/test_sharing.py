"""The memory that a client maps of others'."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from djinn_zmq.client.sharing import Sharing
from djinn_zmq.memory.arena import GRANULE, OwnArena
from djinn_zmq.settings import Settings


@pytest.fixture
def engines() -> Iterator[dict[int, OwnArena]]:
    made = {number: OwnArena.create(4 * GRANULE, "test") for number in (1, 2, 3)}
    yield made
    for arena in made.values():
        arena.close()


def test_an_arena_that_holds_nothing_any_more_is_unmapped_when_another_is_mapped(
    engines: dict[int, OwnArena],
) -> None:
    """It may have been given up, and its pages are not free as long as anybody maps them."""
    before = len(os.listdir("/proc/self/fd"))
    sharing: Any = Sharing(Settings())
    sharing.lease = SimpleNamespace(
        ask=lambda want: (None, os.dup(engines[want.arena].fd)), close=lambda: None
    )
    first = engines[1].lease(2 * GRANULE, 1)
    last = engines[1].lease(GRANULE, 1)
    assert first is not None and last is not None
    sharing.arena(1).check(last.slot)
    engines[1].give_back(first.slot)
    sharing.arena(2)
    assert list(sharing._arenas) == [
        1,
        2,
    ]  # something is in the one, the other may be about to get it
    engines[1].give_back(last.slot)
    filled = engines[2].lease(GRANULE, 1)
    assert filled is not None
    sharing.arena(2).check(filled.slot)
    sharing.arena(3)
    assert list(sharing._arenas) == [2, 3]
    sharing.arena(1)  # is mapped again where it is wanted
    sharing.close()
    assert len(os.listdir("/proc/self/fd")) == before
