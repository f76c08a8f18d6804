"""The server's end of the bus: a ROUTER with every limit set before it is bound."""

import logging
import stat
from collections.abc import Sequence
from pathlib import Path

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
# Route, frame 0, buffers: None where there were more of them than any message has.
Incoming = tuple[bytes, bytes, list[memoryview] | None]


class Router:
    """A bound ROUTER socket. Belongs to one thread, like every ZeroMQ socket."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], settings: Settings, keys: ServerKeys | None
    ) -> None:
        """keys: with them only clients whose public key is allowed get through the handshake."""
        self.socket = context.socket(zmq.ROUTER)
        self.endpoints: list[str] = []
        self._users = keys is not None
        self._fresh: set[bytes] = set()
        self._known: dict[bytes, tuple[str, str]] = {}
        # Routes that need no look: whose they are cannot have changed.
        self._sure: set[bytes] = set()
        limits.apply(self.socket, settings)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            keys.secure(self.socket)
        self.fd, self.unheard = -1, set[int]()  # of `bus.poll`
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
            if route in self._sure or self._recognise(route, first):
                return route, first.bytes, buffers

    def _recognise(self, route: bytes, first: zmq.Frame) -> bool:
        """Is *route* still whose it was? Peers can choose their route: one that takes a dead peer's,
        before `forget`, is not heard.

        Who is at the other end stands in each frame's metadata, and is looked up in each frame of
        users with keys. Over ipc all are the server's own user (its directory says so), and one look
        is good until a peer is gone.
        """
        address = _told(first, ADDRESS)
        # Without keys anybody could send a user's name along.
        who = address, _told(first, USER) if self._users else ""
        known = self._known.get(route)
        if known is None:
            self._known[route] = who
            self._fresh.add(route)
        elif known != who:
            _log.warning("dropped a message of %s under the route of %s", who, known)
            return False
        if not self._users:
            self._sure.add(route)
        return True

    def doubt(self) -> None:
        """Some peer is gone: look again whose the routes are."""
        self._sure.clear()

    def identity(self, route: bytes) -> tuple[str, str] | None:
        """(address, user id) of a route met for the first time since the last call; else None."""
        if route not in self._fresh:
            return None
        self._fresh.discard(route)
        return self._known[route]

    def forget(self, route: bytes) -> None:
        """The peer at *route* is gone: whoever comes under that route next is somebody new."""
        self._known.pop(route, None)
        self._fresh.discard(route)
        self._sure.discard(route)

    def send(self, route: bytes, frame: bytes, buffers: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a message for *route*; never waits.

        Raises Lost where the peer is gone, Busy where its queue is full.
        """
        self.unheard.add(self.fd)
        try:
            self._send(route, MORE_NOW)
        except zmq.Again as exc:
            raise Busy("the peer's queue is full") from exc
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                self._sure.discard(route)
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

    def close(self, linger_ms: int = 0) -> None:
        """linger_ms: for which the context's end may wait for what was sent to be on its way."""
        self.socket.close(linger=linger_ms)
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
