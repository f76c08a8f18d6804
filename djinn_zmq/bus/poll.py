"""Waiting for ZeroMQ sockets and plain descriptors at once, with few system calls.

zmq_poll asks every socket for its events before and after it sleeps, and each question is two
system calls: with a server's seven sockets that was 60 calls a round trip. Here an epoll waits on
the sockets' own descriptors, and a socket is asked only when its descriptor spoke, or when it may
have spoken unheard: using a socket (to send, say) can swallow its signal, so those that are used for
more than receiving are asked before each sleep. Source: the ZMQ_FD entry of
zmq_getsockopt(3).
"""

import select
from collections.abc import Callable
from typing import Any

import zmq

FEW, MANY = 1, 64  # messages a socket may hand over before the others are looked at

Ready = Callable[[int], None]  # told how many messages it may take


class Poll:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}  # by descriptor
        self._used: dict[int, zmq.Socket[bytes]] = {}  # sockets that are sent on, by descriptor
        self._new: dict[int, zmq.Socket[bytes]] = {}  # not asked yet: until then they say nothing

    def watch(self, source: Any, ready: Ready, *, sent_on: bool = False) -> None:
        """Call *ready* when *source*, a ZeroMQ socket or a descriptor, has something to take.

        sent_on: the socket is also used to send. What is not must be taken empty by *ready*.
        """
        fd = descriptor_of(source)
        self._ready[fd] = ready
        if sent_on:
            self._used[fd] = source
        elif isinstance(source, zmq.Socket):
            self._new[fd] = source
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, source: Any) -> None:
        """Before *source* is closed."""
        fd = descriptor_of(source)
        self._epoll.unregister(fd)
        self._ready.pop(fd)
        self._used.pop(fd, None)
        self._new.pop(fd, None)

    def turn(self, timeout_s: float | None) -> None:
        """Call whoever is ready; where nobody is, wait for somebody up to *timeout_s* (None: for
        ever).

        Whoever just spoke may hand over FEW messages, because there is mostly one, and asking
        costs less than failing to receive. Whoever has more then hands over MANY.
        """
        fds, count = [fd for fd, socket in self._used.items() if has_message(socket)], MANY
        if self._new:
            fds += [fd for fd, socket in self._new.items() if has_message(socket)]
            self._new.clear()
        if fds:  # a busy socket must not keep the others from being heard
            fds += [fd for fd, _ in self._epoll.poll(0) if fd not in self._used]
        else:
            fds, count = [fd for fd, _ in self._epoll.poll(timeout_s)], FEW
        for fd in fds:
            ready = self._ready.get(fd)
            if ready is not None:  # not unwatched by the one before it
                ready(count)

    def close(self) -> None:
        self._epoll.close()


def descriptor_of(source: Any) -> int:
    if isinstance(source, zmq.Socket):
        fd: int = source.getsockopt(zmq.FD)  # type: ignore[assignment]
        return fd
    return source if isinstance(source, int) else int(source.fileno())


def has_message(socket: "zmq.Socket[bytes]") -> bool:
    events: int = socket.getsockopt(zmq.EVENTS)  # type: ignore[assignment]
    return bool(events & zmq.POLLIN)
