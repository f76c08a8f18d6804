"""The link between the server and one engine: messages with the peer's route in front.

    [envelope][header + meta][buffer]...        envelope: whose request it is, b"" for our own

A PAIR over ipc. What uses it sees `send`, `receive` and a socket to poll, and nothing of ZeroMQ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import zmq

from djinn_zmq.errors import Busy, Lost
from djinn_zmq.settings import Settings
from djinn_zmq.wire.tensors import SLOT_FROM


class Parcel(NamedTuple):
    envelope: bytes
    frame: bytes
    buffers: list[memoryview]


class Link:
    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], path: Path, settings: Settings, *, bind: bool
    ) -> None:
        """The server binds *path*, in a directory nobody else can enter; the engine connects.

        The server never waits for an engine. An engine may wait for the server, which always reads.
        """
        self.socket = context.socket(zmq.PAIR)
        self._path = path if bind else None
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, settings.high_water),
            (zmq.RCVHWM, settings.high_water),
        ):
            self.socket.setsockopt(option, value)
        endpoint = f"ipc://{path}"
        if bind:
            self.socket.bind(endpoint)
        else:
            self.socket.connect(endpoint)
        self._first = zmq.SNDMORE | zmq.DONTWAIT if bind else zmq.SNDMORE
        self._receive = self.socket.recv
        self._send = self.socket.send

    def send(
        self, envelope: bytes, frame: bytes, buffers: Sequence[bytes | memoryview] = ()
    ) -> None:
        """Queue a message. On the server's end raises Busy where the queue is full.

        Raises Lost where the other end goes away in the middle of it.
        """
        try:
            self._send(envelope, self._first)
        except zmq.Again as exc:
            raise Busy("the engine's queue is full") from exc
        try:
            self._send_rest(frame, buffers)
        except zmq.Again as exc:
            # A PAIR whose peer dies between two frames would wait here for the next peer.
            raise Lost("the other end of the link is gone") from exc

    def _send_rest(self, frame: bytes, buffers: Sequence[bytes | memoryview]) -> None:
        if not buffers:
            self._send(frame, zmq.DONTWAIT)
            return
        self._send(frame, zmq.DONTWAIT | zmq.SNDMORE)
        last = len(buffers) - 1
        for place, buffer in enumerate(buffers):
            flags = zmq.DONTWAIT | zmq.SNDMORE if place < last else zmq.DONTWAIT
            self._send(buffer, flags, copy=len(buffer) < SLOT_FROM)

    def receive(self) -> Parcel | None:
        """The next message, or None when there is none now."""
        try:
            envelope = self._receive(zmq.DONTWAIT)
        except zmq.Again:
            return None
        frame = self._receive()
        buffers = []
        while self.socket.getsockopt(zmq.RCVMORE):
            buffers.append(self._receive(copy=False).buffer)
        return Parcel(envelope, frame, buffers)

    def close(self, *, linger_ms: int = 0) -> None:
        """linger_ms: how long messages already queued may still leave."""
        self.socket.close(linger=linger_ms)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
