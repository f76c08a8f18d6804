"""The server's end of the bus: a ROUTER with every limit set before it is bound."""

import logging
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import zmq

from djinn_zmq.bus import limits
from djinn_zmq.bus.keys import ServerKeys
from djinn_zmq.bus.limits import DONTWAIT, MORE_NOW, SNDMORE
from djinn_zmq.errors import AddressInUse, Busy, Lost, StartError
from djinn_zmq.settings import Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT
from djinn_zmq.wire.tensors import SLOT_FROM

_log = logging.getLogger(__name__)

ADDRESS, USER = "Peer-Address", "User-Id"  # of a frame's metadata
_new = tuple.__new__  # a named tuple's own constructor is a Python function


class Incoming(NamedTuple):
    """One message off the bus. `buffers` is None where it had more frames than any message has."""

    route: bytes
    frame: bytes
    buffers: list[memoryview] | None


class Router:
    """A bound ROUTER socket. Belongs to one thread, like every ZeroMQ socket."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], settings: Settings, keys: ServerKeys | None
    ) -> None:
        """keys: with them only clients whose public key is allowed get through the handshake."""
        self.socket = context.socket(zmq.ROUTER)
        self.endpoints: list[str] = []
        self._told_by = "" if keys is None else USER  # what of a frame says who sent it
        self._known: dict[bytes, str] = {}  # by route: who that was
        self._fresh: dict[bytes, tuple[str, str]] = {}
        limits.apply(self.socket, settings)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            keys.secure(self.socket)
        self.on_use: Callable[[], None] = lambda: None  # for `bus.poll`
        self._receive = self.socket.recv
        self._send = limits.plain_send(self.socket)

    def bind(self, endpoint: str) -> str:
        """Bind and return the endpoint as bound (a wildcard port filled in).

        Raises AddressInUse for a port that is taken, StartError for an address that is not ours.
        """
        if not limits.port_fits(endpoint):
            raise StartError(f"cannot bind {endpoint}: a port is at most {limits.LAST_PORT}")
        try:
            self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
            self.socket.bind(endpoint)
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EADDRINUSE:
                raise AddressInUse(f"{endpoint} is in use by another process") from exc
            raise StartError(f"cannot bind {endpoint}: {exc.strerror}") from exc
        if endpoint.startswith("ipc:"):  # over tcp without keys all have the loopback's address
            self._told_by = self._told_by or ADDRESS
        bound = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.endpoints.append(bound)
        return bound

    def receive(self) -> Incoming | None:
        """The next message, or None when there is none now."""
        while True:
            try:
                route = self._receive(DONTWAIT)
            except zmq.Again:
                return None
            first = last = self._receive(copy=False)
            buffers: list[memoryview] | None = []
            while last.more:
                last = self._receive(copy=False)
                if buffers is not None:
                    buffers.append(last.buffer)
                    if len(buffers) > BUFFERS_LIMIT:
                        buffers = None
            # Peers can choose their route: one that takes a dead peer's, before `forget`, is not heard.
            known = self._known.get(route)
            if known is None:
                self._meet(route, first)
            elif self._told_by and known != (who := _told(first, self._told_by)):
                _log.warning("dropped a message of %s under the route of %s", who, known)
                continue
            return _new(Incoming, (route, first.bytes, buffers))

    def _meet(self, route: bytes, first: zmq.Frame) -> None:
        address = _told(first, ADDRESS)
        # Without keys anybody could send a user's name along.
        user = _told(first, USER) if self._told_by == USER else ""
        self._known[route] = user or address
        self._fresh[route] = address, user

    def identity(self, route: bytes) -> tuple[str, str] | None:
        """(address, user id) of a route met for the first time since the last call; else None."""
        return self._fresh.pop(route, None)

    def forget(self, route: bytes) -> None:
        """The peer at *route* is gone: whoever comes under that route next is somebody new."""
        self._known.pop(route, None)
        self._fresh.pop(route, None)

    def send(self, route: bytes, frame: bytes, buffers: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a message for *route*; never waits.

        Raises Lost where the peer is gone, Busy where its queue is full.
        """
        self.on_use()
        try:
            self._send(route, MORE_NOW)
        except zmq.Again as exc:
            raise Busy("the peer's queue is full") from exc
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                raise Lost("the peer is gone") from exc
            raise
        if not buffers:
            self._send(frame)
            return
        self._send(frame, SNDMORE)
        last = len(buffers) - 1
        for place, buffer in enumerate(buffers):
            more = SNDMORE if place < last else 0
            self._send(buffer, more, copy=len(buffer) < SLOT_FROM)

    def close(self) -> None:
        self.socket.close(linger=0)
        for endpoint in self.endpoints:
            if endpoint.startswith("ipc://"):
                _unlink_socket(Path(endpoint.removeprefix("ipc://")))


def _told(frame: zmq.Frame, name: str) -> str:
    """What the frame's metadata say of its sender, "" where they do not."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def _unlink_socket(path: Path) -> None:
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        pass  # libzmq removes it itself where it can
