"""What benches and tools measure here: the server of all tests, where what is tested is not its start."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest

from djinn_zmq.probe import pinning
from djinn_zmq.probe.serving import MODEL, Served

Lend = Callable[[ModuleType], None]


@pytest.fixture(scope="session")
def served(served) -> Served:
    """The server of all tests, as benches and tools know one."""
    with served.connect() as server:
        server.model(MODEL)  # waits until it is loaded
        status = server.status()
    return Served(served.endpoint, served.tcp, (status.pid, *(one.pid for one in status.engines)))


@contextmanager
def lending(served: Served) -> Iterator[Lend]:
    """Have a module measure *served* where it would start one like it."""

    @contextmanager
    def lent(_, *more, model=MODEL, shape=None, device="cpu", dtype="auto") -> Iterator[Served]:
        assert set(more) <= {"--threads=1"} and (shape, device, dtype) == (None, "cpu", "auto"), (
            more
        )
        yield replace(served, model=model)

    with pytest.MonkeyPatch.context() as patch:
        yield lambda module: patch.setattr(module, "own_server", lent)


@pytest.fixture
def lend(served) -> Iterator[Lend]:
    """Have a module measure `served` where it would start one like it: `lend(bench.noop)`."""
    with lending(served) as lend:
        yield lend


@pytest.fixture
def unpinned(served) -> Iterator[None]:
    """Afterwards this process and `served` run where they ran before, whatever was pinned."""
    cpus = os.sched_getaffinity(0)
    yield
    pinning.pin("all", [os.getpid(), *served.pids], cpus)
