"""The client's end of the bus: one DEALER, messages out, messages in."""

import os
import socket as pysocket
import struct
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from djinn_zmq.bus import limits
from djinn_zmq.bus.limits import DONTWAIT, MORE_NOW, SNDMORE
from djinn_zmq.errors import Busy, ProtocolError, RequestError, Unreachable
from djinn_zmq.settings import Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT
from djinn_zmq.wire.tensors import SLOT_FROM

if TYPE_CHECKING:  # a room that only those with a key need
    from djinn_zmq.bus.keys import ClientKeys

Frames = tuple[bytes, list[memoryview]]

PROBE_S = 0.2
# Of zmq_socket_monitor(3). pyzmq's own reader would import asyncio: 50 ms of a client's start.
MONITOR_EVENT = struct.Struct("=hi")


class Dealer:
    """A connected DEALER. Belongs to one thread."""

    def __init__(self, endpoint: str, settings: Settings, keys: "ClientKeys | None") -> None:
        """endpoint: "ipc://PATH" or "tcp://HOST:PORT".

        Raises RequestError for another kind of endpoint, Unreachable where no socket file stands, or this
        process has no descriptors left.
        """
        scheme, _, rest = endpoint.partition("://") if isinstance(endpoint, str) else ("", "", "")
        if scheme not in ("ipc", "tcp") or not rest or "\0" in rest:
            raise RequestError(
                f'endpoint "{endpoint}" is not understood: use ipc://PATH or tcp://HOST:PORT'
            )
        if not limits.port_fits(endpoint):
            raise RequestError(
                f"cannot connect to {endpoint}: a port is at most {limits.LAST_PORT}"
            )
        if scheme == "ipc" and not os.path.exists(rest):
            raise Unreachable(f"no server at {endpoint}: start one with 'djinn serve'")
        self._endpoint = endpoint
        # A context of its own: closing this client cannot wait for another's messages.
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self.socket = self.context.socket(zmq.DEALER)
            # Before connecting: a refusal that comes at once would go untold.
            self.monitor = self.socket.get_monitor_socket(
                zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            )
        except zmq.ZMQError as exc:
            self.context.destroy(linger=0)
            raise Unreachable(f"cannot connect to {endpoint}: {exc.strerror}") from exc
        self._end = limits.end_with(self, self.context, self.monitor, self.socket)
        limits.apply(self.socket, settings)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if keys is not None:
            keys.secure(self.socket)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as exc:
            self.close()
            hint = ": use tcp://HOST:PORT" if scheme == "tcp" else ""
            raise RequestError(
                f"cannot connect to {endpoint}: {os.strerror(exc.errno or 0)}{hint}"
            ) from exc
        self._gone = False  # disconnected, and not connected again since
        self._receive = self.socket.recv
        self._send = limits.plain_send(self.socket)

    def send(self, frame: bytes, buffers: Sequence[bytes | memoryview] = ()) -> None:
        """Queue a message; never waits. Raises Busy where the queue is full."""
        try:
            if not buffers:
                self._send(frame, DONTWAIT)
                return
            flags = [MORE_NOW, *[SNDMORE] * (len(buffers) - 1), 0]
            copies = [True, *[len(buffer) < SLOT_FROM for buffer in buffers]]
            # In one call of C: a KeyboardInterrupt between two frames would leave half a message, and
            # the next one would be the other half.
            deque(map(self._send, (frame, *buffers), flags, copies), maxlen=0)
        except zmq.Again as exc:
            raise Busy("the queue to the server is full: no server takes from it") from exc

    def receive(self, wait: bool = False) -> Frames | None:
        """The next message, or None when there is none now.

        wait: None only when there is none for as long as the socket's receive timeout.
        """
        buffers: list[memoryview] = []
        try:  # a Frame knows whether more follow
            first = last = self._receive(0 if wait else DONTWAIT, copy=False)
            while last.more:
                last = self._receive(copy=False)
                buffers.append(last.buffer)
        except zmq.Again:
            return None
        except BaseException:  # a KeyboardInterrupt: what is left of it is no message's beginning
            while self.socket.getsockopt(zmq.RCVMORE):
                self._receive()
            raise
        if len(buffers) > BUFFERS_LIMIT:
            raise ProtocolError(f"a message of {len(buffers)} buffers: at most {BUFFERS_LIMIT}")
        return first.bytes, buffers

    def why_silent(self) -> str:
        """That nobody listens there, or that there is no such host; "" where it cannot be told. A killed
        server's socket file stays, and libzmq tries on in silence.

        Asks by another connection: not for a server that answers, which would have to see it off.
        """
        scheme, _, rest = self._endpoint.partition("://")
        host, _, port = rest.rpartition(":")
        try:
            if scheme == "ipc":
                with pysocket.socket(pysocket.AF_UNIX) as probe:
                    probe.settimeout(PROBE_S)
                    probe.connect(rest)
            else:
                pysocket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return "nobody listens there; start one with 'djinn serve'"
        except pysocket.gaierror as exc:
            return f'the host name "{host}" cannot be resolved: {exc.strerror}'
        except (OSError, ValueError):  # a network's own silence, or a path of libzmq's own kind
            return ""
        return ""

    def lost(self) -> bool:
        """Is the other end gone, or was it since this was last asked? Though it be back: what it was asked
        before is not answered any more."""
        lost = self._gone
        while limits.has_message(self.monitor):
            event, _ = MONITOR_EVENT.unpack(self.monitor.recv_multipart()[0])
            self._gone = event == zmq.EVENT_DISCONNECTED
            lost = lost or self._gone
        return lost

    def filenos(self) -> list[int]:
        """What speaks, edge-triggered, where `receive` or `lost` may have something new."""
        return [int(socket.getsockopt(zmq.FD)) for socket in (self.socket, self.monitor)]

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.disable_monitor()
        self._end()
