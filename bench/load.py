"""Many clients at once, each in a closed loop: it asks again when it was answered.

All clients of a case live in this process, on one thread: an event loop over their connections, for
ZeroMQ an epoll, for gRPC its own asyncio. So what is compared is servers, under generators of one
design. Each client has a connection of its own, as separate programs would.
"""

import asyncio
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import zmq

from bench.grpc_echo import METHOD, SERVICE
from bench.roundtrips import noop_frame
from djinn_zmq.errors import Lost
from djinn_zmq.probe.serving import MODEL
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

ANSWER_S = 10.0  # an answer that takes longer is lost

EVENTS, POLLIN, DONTWAIT = zmq.EVENTS, int(zmq.POLLIN), zmq.DONTWAIT


@dataclass(frozen=True, slots=True)
class Window:
    """What was answered in one stretch of time. latencies_s: float64 (answers,), in seconds."""

    elapsed_s: float
    latencies_s: np.ndarray

    @property
    def answers(self) -> int:
        return len(self.latencies_s)


REQUEST = slice(8, 16)  # the bytes of a header that hold the request's number

Generator = Callable[[int, float], Window]  # (clients, seconds) → what was answered


# ---- ZeroMQ


class Dealers:
    """Clients over ZeroMQ. frames: what each of them sends, over and over."""

    def __init__(self, endpoint: str, count: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        self.sockets = [self._connected(endpoint) for _ in range(count)]
        self.frames: list[bytes] = []

    def _connected(self, endpoint: str) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(endpoint)
        return dealer

    def run(self, clients: int, seconds: float) -> Window:
        """*clients* of them, for *seconds*. Raises Lost where an answer does not come."""
        by_fd = {
            dealer.fileno(): (place, dealer, self.frames[place])
            for place, dealer in enumerate(self.sockets[:clients])
        }
        sent = [0.0] * clients
        latencies: list[float] = []
        clock = time.perf_counter
        with select.epoll() as epoll:
            for fd in by_fd:
                epoll.register(fd, select.EPOLLIN)
            begin = clock()
            end = begin + seconds
            for place, dealer, frame in by_fd.values():
                sent[place] = clock()
                dealer.send(frame)
            under_way = clients
            ready = [(fd, select.EPOLLIN) for fd in by_fd]  # sending may have taken the news
            while under_way:
                if not ready:
                    raise Lost(f"{under_way} answers did not come in {ANSWER_S:g} s")
                for fd, _ in ready:
                    place, dealer, frame = by_fd[fd]
                    # The descriptor tells once; only a socket that was found empty tells again.
                    while _readable(dealer):
                        if dealer.recv(DONTWAIT)[REQUEST] != frame[REQUEST]:
                            continue  # the server's knock, after other clients have gone
                        now = clock()
                        latencies.append(now - sent[place])
                        if now < end:
                            sent[place] = now
                            dealer.send(frame)
                        else:
                            under_way -= 1
                if under_way:
                    ready = epoll.poll(ANSWER_S)
        return Window(clock() - begin, np.array(latencies))

    def close(self) -> None:
        self._context.destroy(linger=0)


def _readable(dealer: zmq.Socket[bytes]) -> bool:
    return bool(int(dealer.get(EVENTS)) & POLLIN)


@contextmanager
def dealers(endpoint: str, count: int) -> Iterator[Generator]:
    """Clients of a bare echo."""
    clients = Dealers(endpoint, count)
    try:
        clients.frames = [noop_frame(1 + place) for place in range(count)]
        yield clients.run
    finally:
        clients.close()


@contextmanager
def djinn_clients(endpoint: str, count: int) -> Iterator[Generator]:
    """Clients of a Djinn server, each with a session of its own."""
    clients = Dealers(endpoint, count)
    try:
        clients.frames = [noop_frame(session) for session in _open(clients.sockets)]
        yield clients.run
    finally:
        clients.close()


def _open(sockets: Sequence[zmq.Socket[bytes]]) -> list[int]:
    """A session on the embedded model for each of *sockets*. Raises what the server refuses with."""
    frame = codec.encode(Op.OPEN, messages.Open(MODEL), request=1)
    for dealer in sockets:
        dealer.send(frame)
    return [_opened(dealer) for dealer in sockets]


def _opened(dealer: zmq.Socket[bytes]) -> int:
    if not dealer.poll(int(ANSWER_S * 1000)):
        raise Lost(f"the server opened no session in {ANSWER_S:g} s")
    message = codec.decode(dealer.recv())
    if message.header.flags & Flag.ERROR:
        raise codec.error_of(message)
    session: int = message.meta.session
    return session


# ---- gRPC


@contextmanager
def grpc_clients(address: str, count: int) -> Iterator[Generator]:
    """Clients of `bench.grpc_echo`, sync or aio server: the same clients for both."""
    import grpc  # 0.2 s and a few threads: not before the round trips are measured

    options = [("grpc.use_local_subchannel_pool", 1)]  # else all share one connection
    with asyncio.Runner() as runner:

        async def connect() -> list[grpc.aio.Channel]:
            channels = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            return channels

        async def close() -> None:
            await asyncio.gather(*(channel.close() for channel in channels))

        channels = runner.run(connect())
        calls = [channel.unary_unary(f"/{SERVICE}/{METHOD}") for channel in channels]
        try:
            yield lambda clients, seconds: runner.run(_run_calls(calls[:clients], seconds))
        finally:
            runner.run(close())


async def _run_calls(calls: Sequence[Callable[[bytes], object]], seconds: float) -> Window:
    frame = noop_frame(1)
    latencies: list[float] = []
    clock = time.perf_counter
    begin = clock()
    end = begin + seconds

    async def client(call: Callable[[bytes], object]) -> None:
        now = clock()
        while now < end:
            sent = now
            await call(frame)  # type: ignore[misc]
            now = clock()
            latencies.append(now - sent)

    await asyncio.gather(*(client(call) for call in calls))
    return Window(clock() - begin, np.array(latencies))
