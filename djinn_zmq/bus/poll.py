"""Waiting for ZeroMQ sockets, lanes and plain descriptors at once, with few system calls.

zmq_poll asks every socket for its events before and after it sleeps, and each question is two
system calls: with a server's seven sockets that was 60 calls a round trip. Here an epoll waits on
the sockets' own descriptors, and a socket is asked only when its descriptor spoke, or when it may
have spoken unheard: using a socket (to send, say) can swallow its signal, so one that was used since
it was last asked is asked before the next sleep. Source: the ZMQ_FD entry of zmq_getsockopt(3).

A lane's bell is waited for edge-triggered and never read: one call less for each message. Rung ahead of a
message, it finds nothing yet: then we stay awake for what is certain to follow, and need no second wake-up;
nor any, where we know ourselves that something will come at once.
"""

import math
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq
from zmq.backend import zmq_poll

from djinn_zmq.bus.lane import CPU_EACH, SOON_NS, Lane
from djinn_zmq.bus.limits import POLLIN

MANY = 64  # messages a source may hand over before the others are looked at
COLD_NS = 50_000  # after which what the last message needed may have left the caches
AT_ONCE = 32  # sources told of at once; for epoll's default of 1023 each wait allocates 12 KiB

Ready = Callable[..., object]  # takes one message; true: there may be more, though nothing says so
NOBODY: tuple[Ready, tuple[Any, ...]] = (lambda: False, ())  # what was unwatched takes nothing
Asked = list[tuple["zmq.Socket[bytes]", int]]  # a socket as zmq_poll wants it
Heard = Sequence[tuple[int, int]]  # descriptors, and what epoll says of them


class Used(Protocol):
    """A socket that is received from and sent on. Whenever it sends, it adds *fd* to *unheard*."""

    socket: "zmq.Socket[bytes]"
    fd: int
    unheard: set[int]


class Poll:
    def __init__(self, spin_us: int = 0) -> None:
        """spin_us: how long to look at lanes again and again before sleeping, after each message."""
        self._epoll = select.epoll()
        # By descriptor: with what it is called. Not a partial: that is 3 us more where it is cold.
        self._ready: dict[int, tuple[Ready, tuple[Any, ...]]] = {}
        self._unheard: set[int] = set()  # those that may have something, though they are silent
        self._asked: dict[int, Asked] = {}  # of sockets: so they are asked whether they have
        self._lanes: dict[int, Lane] = {}
        self._spin_ns = spin_us * 1000
        self.may_spin = True
        self.stays_awake = CPU_EACH  # nor does anybody ring ahead over a link where it is false
        # Called before that wait: a few microseconds' work that makes the message's own quicker, where
        # the last one is long ago.
        self.meanwhile: Callable[[], object] = lambda: None
        self._warm_ns = -math.inf
        self._expected = -1  # the lane that something will come on at once
        self._early: set[int] = set()  # lanes whose last message was seen before its own ring
        self._vain: set[int] = set()  # lanes that nothing has come on since they were waited for

    def watch(self, source: Any, ready: Ready, *args: Any) -> None:
        """Call *ready* with *args* when *source*, a ZeroMQ socket or a descriptor, has something to
        take.

        A socket watched so is only received from, and *ready* takes it empty.
        """
        fd = self._register(source, select.EPOLLIN, ready, args)
        if isinstance(source, zmq.Socket):
            self._asked[fd] = [(source, POLLIN)]
            self._unheard.add(fd)  # until it is asked once it says nothing

    def watch_used(self, source: Used, ready: Ready, *args: Any) -> None:
        """The same for a socket that is also sent on; *ready* takes one message and returns true."""
        self.watch(source.socket, ready, *args)
        source.fd, source.unheard = descriptor_of(source.socket), self._unheard

    def watch_lane(self, lane: Lane, ready: Ready, *args: Any) -> None:
        """The same for a lane: *ready* is called when its other end has rung, and returns whether the
        lane is unfinished."""
        fd = self._register(lane, select.EPOLLIN | select.EPOLLET, ready, args)
        self._lanes[fd] = lane
        self._unheard.add(fd)  # it may have been written to before

    def _register(self, source: Any, events: int, ready: Ready, args: tuple[Any, ...]) -> int:
        fd = descriptor_of(source)
        self._ready[fd] = ready, args
        self._epoll.register(fd, events)
        return fd

    def watch_room(self, source: Any, wanted: bool) -> None:
        """Call who watches *source*, a descriptor, also when it can be written to."""
        events = select.EPOLLIN | (select.EPOLLOUT if wanted else 0)
        self._epoll.modify(descriptor_of(source), events)

    def unwatch(self, source: Any) -> None:
        """Before *source* is closed. Nothing where it is watched no more."""
        fd = descriptor_of(source)
        if self._ready.pop(fd, None) is None:
            return
        self._epoll.unregister(fd)
        self._asked.pop(fd, None)
        self._lanes.pop(fd, None)
        self._unheard.discard(fd)
        self._early.discard(fd)
        self._vain.discard(fd)

    def expect(self, lane: Lane) -> None:
        """Something comes on *lane*, which is watched, in less time than it takes to wake up: stay awake
        for it, in the next turn that finds nothing else."""
        self._expected = lane.fileno()

    def turn(self, timeout_s: float | None) -> None:
        """Call whoever is ready; where nobody is, wait for somebody up to *timeout_s* (None: for
        ever).

        Whoever just spoke is called once, because there is mostly one message, and asking costs less
        than failing to receive. Whoever has more then hands over MANY.
        """
        if self._unheard and (silent := self._silent_ones()):
            self._take_many(silent)
            return
        heard: Heard
        fd, self._expected = self._expected, -1
        if fd >= 0 and timeout_s != 0 and self._comes_as_expected(fd):
            heard = [(fd, 0)]
        elif self._spin_ns and self.may_spin:
            heard = self._spin(timeout_s)
        else:
            heard = self._epoll.poll(timeout_s, AT_ONCE)
            if self.stays_awake and len(heard) == 1 and timeout_s != 0 and self.may_spin:
                self._wait_awake(heard[0][0])
        for fd, _ in heard:
            ready, args = self._ready.get(fd, NOBODY)
            if ready(*args):
                self._unheard.add(fd)

    def _wait_awake(self, fd: int) -> None:
        """Where *fd* is a lane that was rung ahead: until it has something, or too long."""
        lane = self._lanes.get(fd)
        if lane is None or fd in self._vain and not lane.unfinished():
            return
        self._vain.discard(fd)
        if fd in self._early:
            self._early.discard(fd)
        elif lane.rung_ahead():
            self._comes(fd, lane)

    def _comes_as_expected(self, fd: int) -> bool:
        lane = self._lanes.get(fd)  # None: what was expected has ended
        if not self.stays_awake or not self.may_spin or lane is None or fd in self._vain:
            return False
        return self._comes(fd, lane)

    def _comes(self, fd: int, lane: Lane) -> bool:
        """Stay awake until something is on *lane*, or too long."""
        if time.perf_counter_ns() - self._warm_ns > COLD_NS:
            self.meanwhile()
        came = lane.comes(SOON_NS)
        (self._early if came else self._vain).add(fd)
        self._warm_ns = time.perf_counter_ns()
        return came

    def _silent_ones(self) -> list[int]:
        """Those of the unheard that have something."""
        silent = []
        while self._unheard:
            fd = self._unheard.pop()
            asked = self._asked.get(fd)  # None: a lane, which is one of them only where it has
            if asked is None or zmq_poll(asked, 0):
                silent.append(fd)
        return silent

    def _take_many(self, silent: list[int]) -> None:
        """From all that have something: a busy source must not keep the others from being heard."""
        spoke = [fd for fd, _ in self._epoll.poll(0, AT_ONCE)]
        for fd in dict.fromkeys(silent + spoke):
            for _ in range(MANY):
                ready, args = self._ready.get(fd, NOBODY)
                if not ready(*args):
                    break
            else:
                self._unheard.add(fd)

    def _spin(self, timeout_s: float | None) -> Heard:
        """Wait for somebody, awake for the first while of it."""
        spin_ns = self._spin_ns
        if timeout_s is not None:
            spin_ns = min(spin_ns, int(timeout_s * 1e9))
            timeout_s -= spin_ns / 1e9
        limit_ns = time.perf_counter_ns() + spin_ns
        while time.perf_counter_ns() < limit_ns:
            for fd, lane in self._lanes.items():
                if lane.unfinished():
                    return [(fd, 0)]
            if found := self._epoll.poll(0, AT_ONCE):
                return found
        return self._epoll.poll(timeout_s and max(0.0, timeout_s), AT_ONCE)

    def close(self) -> None:
        self._epoll.close()


def descriptor_of(source: Any) -> int:
    if isinstance(source, zmq.Socket):
        fd: int = source.getsockopt(zmq.FD)  # type: ignore[assignment]
        return fd
    return source if isinstance(source, int) else int(source.fileno())
