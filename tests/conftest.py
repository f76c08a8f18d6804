"""How the suite is spread over workers, and what they begin with."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Running

# The rooms whose files take longest. What comes last takes a second or two a file: a worker is given its next
# file early, and what it is given while the other has none left, it does alone.
FIRST = ("end_to_end", "bench", "tools", "models", "engine", "wire", "client", "tests")


# Where a user's environment forbids bytecode, each of some 370 processes would compile this package anew,
# and each worker the tests with their assertions.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores. One more would fill the time that workers wait, but what it brings
    of its own, imports and a server, takes as long (two cores: 20 s of CPU)."""
    return len(os.sched_getaffinity(0))


def pytest_configure() -> None:
    # What is imported stays: looking through it for garbage, again and again, takes a third of a second,
    # and tests that count what they leave behind do so twice each.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that the workers end together."""
    rank = {room: place for place, room in enumerate(FIRST)}
    items.sort(
        key=lambda item: rank.get(_room_of(item.path), len(FIRST))
    )  # stable: files stay together


def _room_of(path: Path) -> str:
    """That of its tests, whatever rooms are within; "tests" for what lies in none."""
    room, *rest = path.relative_to(Path(__file__).parent).parts
    return room if rest else "tests"


@pytest.fixture(scope="session")
def served() -> Iterator["Running"]:
    """One server with tiny, over ipc and over tcp on the loopback, for all of a worker's tests that
    leave it as able as it was: an engine takes seconds to start."""
    from tests.end_to_end.conftest import free_port, running  # what a worker needs that starts one

    # In a folder that a test may open to another user.
    with (
        tempfile.TemporaryDirectory(prefix="djinn-test-", dir="/tmp") as name,
        running(Path(name) / "s", "--model=tiny", port=free_port()) as one,
    ):
        yield one
