"""A server whose loop is turned by hand, with an engine that is a link and a socket."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.bus.link import Link
from djinn_zmq.errors import Closed
from djinn_zmq.server.server import Server
from djinn_zmq.settings import KIB, Settings
from djinn_zmq.wire import codec, messages, states
from djinn_zmq.wire.messages import Flag, Keep, ModelInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor, inline
from djinn_zmq.wire.tiers import Kept

TINY = ModelInfo("tiny", "tiny", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")
TURN_S = 0.05


class Served:
    """A server that has bound everything, and the other ends of its engine."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(arena=64 * KIB)
        path = folder / "d.sock"
        self.server = Server(path, settings, devices=["cpu"], tcp="tcp://127.0.0.1:*")
        self.ipc, self.tcp = self.server.endpoints()
        (self.engine,) = self.server.fleet.engines
        self.engine.link, ends = Link.create(settings)
        self.link = Link(Lane(ends, settings, first=False), server=-1)
        self.engine.lease, theirs = lease_bus.pair()
        theirs.setblocking(False)
        self.lease = LeaseSocket(theirs)
        self.engine.state = states.Engine.READY
        self.engine.sources["tiny"] = "tiny"
        self.engine.models["tiny"] = TINY
        self.server.links.watch(self.engine)
        self.dealers: list[Dealer] = []

    def connect(self, endpoint: str) -> Dealer:
        dealer = Dealer(endpoint, Settings(), None)
        self.dealers.append(dealer)
        return dealer

    def turn(self) -> None:
        self.server._poll.turn(TURN_S)

    def ask(self, dealer: Dealer, op: Op, meta: Any, buffers: Any = (), **header: Any) -> Any:
        dealer.send(codec.encode(op, meta, request=1, buffers=len(buffers), **header), buffers)
        return self.answer(dealer)

    def answer(self, dealer: Dealer) -> Any:
        for _ in range(200):
            self.turn()
            if (frames := dealer.receive()) is None:
                continue
            message = codec.decode(*frames)
            if message.header.flags & Flag.ERROR:
                raise codec.error_of(message)
            if not message.header.flags & Flag.PROGRESS:
                return message.meta
        raise AssertionError("no answer")

    def until(self, done: Callable[[], object]) -> None:
        for _ in range(200):
            if done():
                return
            self.turn()
            self.server._do_what_is_due()
        raise AssertionError("it does not happen")

    def close(self) -> None:
        for dealer in self.dealers:
            dealer.close()
        self.link.close()
        self.lease.close()
        if self.server.path.exists():
            self.server.close()


def deaths_of(served: Served) -> list[str]:
    """Why engines died, from now on; none is started again."""
    deaths: list[str] = []
    served.server.lanes.end_of_engine = lambda _, reason: deaths.append(reason)  # type: ignore[method-assign]
    served.server.fleet.on_death = lambda engine: engine.bury()[1]  # type: ignore[assignment,method-assign]
    return deaths


def keep(served: Served, session: int, numbers: range, arena: int = 1) -> None:
    """The engine says, without a ring yet, that these are kept."""
    for number in numbers:
        kept = Kept(number, session, 1, 2, Tensor("float32", (1, 1, 1), Slot(arena, 0, 1)))
        meta = Keep(inline(np.zeros((1, 1), np.int64)), (kept,))
        served.link.post(codec.encode(Op.KEEP, meta, session=session))


def joined(served: Served, dealer: Dealer) -> LeaseSocket:
    """What shares memory with the server from now on: over a socket that does not wait."""
    welcome = served.ask(dealer, Op.HELLO, messages.Hello("", 0))
    sock = lease_bus.socket.socket(lease_bus.socket.AF_UNIX, lease_bus.socket.SOCK_SEQPACKET)
    sock.connect(welcome.lease_path)
    sock.setblocking(False)
    lease = LeaseSocket(sock)
    lease.send(messages.Join(welcome.token))
    assert told(served, lease) == messages.Granted(0, "")
    return lease


def told(served: Served, lease: LeaseSocket) -> Any:
    """The next packet; descriptors that came with it are closed."""
    packet, fds = heard(served, lease)
    lease_bus.close_all(fds)
    return packet


def heard(served: Served, lease: LeaseSocket) -> tuple[Any, list[int]]:
    """The next packet, and the descriptors that came with it, which are the caller's to close."""
    for _ in range(200):
        served.turn()
        with contextlib.suppress(BlockingIOError):
            return lease.receive()
    raise AssertionError("no packet")


def last_word(client: Dealer) -> Closed:
    """What a server that has closed still said."""
    client.socket.rcvtimeo = 10_000
    frames = client.receive(wait=True)
    assert frames is not None
    error = codec.error_of(codec.decode(*frames))
    assert isinstance(error, Closed)
    return error


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(64)]  # takes the gaps, too
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        lease_bus.close_all(fillers)
