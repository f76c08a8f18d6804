import functools
import gc
import os
import select
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zmq

from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.router import Router
from djinn_zmq.errors import Lost
from djinn_zmq.settings import Settings

WAIT_S = 10.0  # never reached where the code is right


def wait(lane: Lane, gone: int, timeout_s: float) -> bool:
    """Sleep until *lane* may have something, the descriptor *gone* is readable, or time is up.

    True where *gone* spoke. For an end without a `Poll`.
    """
    poll = select.poll()
    poll.register(gone, select.POLLIN)
    poll.register(lane.fileno(), select.POLLIN)
    ready = poll.poll(timeout_s * 1000)
    lane.hush()
    return any(fd == gone for fd, _ in ready)


@pytest.fixture(scope="session", autouse=True)
def zero_copy_thread() -> None:
    """pyzmq's own context for the frames it sends without a copy: made once, never ended."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as two:
        one.bind("inproc://once")
        two.connect("inproc://once")
        one.send(bytes(2**17), copy=False)
        two.recv()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every test ends with the descriptors it began with."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    if len(os.listdir("/proc/self/fd")) > before:
        gc.collect()  # takes 0.1 s once torch is loaded
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    path = Path(tempfile.mkdtemp(prefix="djb"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def until_lost(router: Router, route: bytes, *, unheard: bool) -> None:
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            if unheard:
                router.socket.send_multipart([route, b"?"], zmq.DONTWAIT)
            else:
                router.send(route, b"?")
        except Lost:
            return
        except zmq.ZMQError as exc:
            assert unheard and exc.errno == zmq.EHOSTUNREACH
            return
        router.socket.poll(5)
    raise AssertionError("the router does not notice")


@pytest.fixture
def until_unreachable() -> Any:
    """Sends by (router, route) until libzmq knows that nobody is there, and the router does not."""
    return functools.partial(until_lost, unheard=True)


class Arrived(NamedTuple):
    """What `Router.receive` gives."""

    route: bytes
    frame: bytes
    buffers: Any


class Bus:
    """A bound Router, and Dealers connected to it."""

    wait_s = WAIT_S

    def __init__(self, context: Any, endpoint: str) -> None:
        self.context = context
        self._wanted = endpoint
        self._ends: list[Any] = []
        self.router: Router
        self.endpoint = ""

    def bind(self, settings: Settings | None = None, endpoint: str | None = None) -> Router:
        self.router = Router(self.context, settings or Settings(), None)
        self._ends.append(self.router)
        self.endpoint = self.router.bind(endpoint or self._wanted)
        return self.router

    def dealer(self, settings: Settings | None = None) -> Dealer:
        dealer = Dealer(self.endpoint, settings or Settings(), None)
        self._ends.append(dealer)
        return dealer

    def arrives(self) -> Arrived:
        """The next message at the router."""
        assert self.router.socket.poll(int(WAIT_S * 1000)), "nothing came"
        incoming = self.router.receive()
        assert incoming is not None
        return Arrived(*incoming)

    def answer(self, dealer: Dealer) -> tuple[bytes, list[memoryview]]:
        """The next message at *dealer*."""
        assert dealer.socket.poll(int(WAIT_S * 1000)), "nothing came"
        frames = dealer.receive()
        assert frames is not None
        return frames

    def until_lost(self, route: bytes, *, unheard: bool = False) -> None:
        """Send to *route* until nobody is there. unheard: only libzmq is to know it."""
        until_lost(self.router, route, unheard=unheard)

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture(params=["ipc", "tcp"])
def bus(request: pytest.FixtureRequest, context: Any, directory: Path) -> Iterator[Bus]:
    endpoint = f"ipc://{directory}/bus" if request.param == "ipc" else "tcp://127.0.0.1:*"
    bus = Bus(context, endpoint)
    yield bus
    bus.close()
