"""Waiting for ZeroMQ sockets, lanes and plain descriptors at once, with few system calls.

zmq_poll asks every socket for its events before and after it sleeps, and each question is two
system calls: with a server's seven sockets that was 60 calls a round trip. Here an epoll waits on
the sockets' own descriptors, and a socket is asked only when its descriptor spoke, or when it may
have spoken unheard: using a socket (to send, say) can swallow its signal, so one that was used since
it was last asked is asked before the next sleep. Source: the ZMQ_FD entry of zmq_getsockopt(3).

A lane's bell is waited for edge-triggered and never read: one call less for each message.
"""

import select
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq
from zmq.backend import zmq_poll

from djinn_zmq.bus.lane import Lane

FEW, MANY = 1, 64  # messages a source may hand over before the others are looked at

POLLIN = int(zmq.POLLIN)

Ready = Callable[[int], None]  # told how many messages it may take


class Used(Protocol):
    """A socket that is received from and sent on. used: has it been, since it was last asked?"""

    socket: "zmq.Socket[bytes]"
    used: bool


class Poll:
    def __init__(self, spin_us: int = 0) -> None:
        """spin_us: how long to look at lanes again and again before sleeping, after each message."""
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Ready, Lane | None]] = {}  # by descriptor
        self._used: tuple[tuple[Used, int], ...] = ()  # with its descriptor
        self._unheard: set[int] = set()  # those that may have something, though they are silent
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._spin_ns = spin_us * 1000

    def watch(self, source: Any, ready: Ready) -> None:
        """Call *ready* when *source*, a ZeroMQ socket or a descriptor, has something to take.

        A socket watched so is only received from, and *ready* takes it empty.
        """
        fd = self._register(source, ready, select.EPOLLIN)
        if isinstance(source, zmq.Socket):
            self._sockets[fd] = source
            self._unheard.add(fd)  # until it is asked once it says nothing

    def watch_used(self, source: Used, ready: Ready) -> None:
        """The same for a socket that is also sent on."""
        source.used = True
        fd = self._register(source.socket, ready, select.EPOLLIN)
        self._used = (*self._used, (source, fd))

    def watch_lane(self, lane: Lane, ready: Ready) -> None:
        """The same for a lane: *ready* is called when its other end has rung."""
        fd = self._register(lane, ready, select.EPOLLIN | select.EPOLLET, lane)
        self._unheard.add(fd)  # it may have been written to before

    def _register(self, source: Any, ready: Ready, events: int, lane: Lane | None = None) -> int:
        fd = descriptor_of(source)
        self._watched[fd] = ready, lane
        self._epoll.register(fd, events)
        return fd

    def unwatch(self, source: Any) -> None:
        """Before *source* is closed."""
        fd = descriptor_of(source)
        self._epoll.unregister(fd)
        self._watched.pop(fd)
        self._used = tuple(one for one in self._used if one[1] != fd)
        self._sockets.pop(fd, None)
        self._unheard.discard(fd)

    def turn(self, timeout_s: float | None) -> None:
        """Call whoever is ready; where nobody is, wait for somebody up to *timeout_s* (None: for
        ever).

        Whoever just spoke may hand over FEW messages, because there is mostly one, and asking
        costs less than failing to receive. Whoever has more then hands over MANY.
        """
        heard = self._silent_ones() if self._unheard else []
        for source, fd in self._used:
            if source.used:
                source.used = has_message(source.socket)
                if source.used:
                    heard.append((fd, 0))
        count = FEW
        if heard:  # a busy source must not keep the others from being heard
            count = MANY
            heard += [one for one in self._epoll.poll(0) if one[0] not in dict(heard)]
        else:
            heard = self._spin(timeout_s) if self._spin_ns else self._epoll.poll(timeout_s)
        for fd, _ in heard:
            watched = self._watched.get(fd)
            if watched is None:  # unwatched by the one before it
                continue
            ready, lane = watched
            ready(count)
            if lane is not None and not lane.closed and lane.unfinished():
                self._unheard.add(fd)

    def _silent_ones(self) -> list[tuple[int, int]]:
        fds, self._unheard = self._unheard, set()
        sockets = self._sockets
        return [(fd, 0) for fd in fds if fd not in sockets or has_message(sockets[fd])]

    def _spin(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for somebody, awake for the first while of it."""
        limit_ns = time.perf_counter_ns() + self._spin_ns
        while timeout_s != 0 and time.perf_counter_ns() < limit_ns:
            for fd, (_, lane) in self._watched.items():
                if lane is not None and lane.unfinished():
                    return [(fd, 0)]
            if found := self._epoll.poll(0):
                return found
        return self._epoll.poll(timeout_s)

    def close(self) -> None:
        self._epoll.close()


def descriptor_of(source: Any) -> int:
    if isinstance(source, zmq.Socket):
        fd: int = source.getsockopt(zmq.FD)  # type: ignore[assignment]
        return fd
    return source if isinstance(source, int) else int(source.fileno())


def has_message(socket: "zmq.Socket[bytes]") -> bool:
    # Not getsockopt(EVENTS): pyzmq makes an enum member of the answer, in Python.
    return bool(zmq_poll([(socket, POLLIN)], 0))
