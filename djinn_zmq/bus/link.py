"""The link between the server and one engine: a lane whose envelopes say whose request it is, by the
peer's route; b"": it is the server's or the engine's own.

The server makes it and the engine inherits its descriptors. What is in it outlives the engine: its
last words are still there to be read.
"""

import contextlib
import select
from collections.abc import Sequence

from djinn_zmq.bus.lane import LINK_CAPACITY, Ends, Lane, Piece
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.settings import Settings
from djinn_zmq.wire.codec import HEADER_SIZE

RINGFUL = LINK_CAPACITY // HEADER_SIZE  # more messages than its ring cannot hold
PAUSE_MS = 1  # between two looks of an engine that waits for the server to read


class Link:
    """One end. The server's never waits; an engine may wait for the server, which always reads."""

    def __init__(self, lane: Lane, server: int | None = None) -> None:
        """server: on the engine's end, a descriptor that becomes readable when the server is gone."""
        self.lane = lane
        self.receive = lane.receive
        self.of_use = True  # False once something made no sense: then what follows may not either
        self._server = server

    @classmethod
    def create(cls, settings: Settings) -> tuple["Link", Ends]:
        """The server's end, and what an engine makes its own of; the caller's to close."""
        lane, theirs = Lane.create(LINK_CAPACITY, settings)
        return cls(lane), theirs

    def send(
        self,
        envelope: bytes,
        frame: bytes,
        buffers: Sequence[Piece] = (),
        *,
        bounded: bool = False,
    ) -> None:
        """Pass on a message. On the server's end raises Busy where the engine does not read and the message is
        a client's, or *bounded*: what else the server has to say is not lost, and no more than what it keeps.

        On the engine's end waits for room, and raises Lost where the server is gone.
        """
        try:
            self.lane.send(envelope, frame, buffers)
        except Busy as exc:
            self._send_later(exc, envelope, frame, buffers, bounded)

    def post(self, frame: bytes) -> None:
        """The same for a message that can wait for the next one to ring, or for `Lane.ring`."""
        try:
            self.lane.send(b"", frame, ring=False)
        except Busy as exc:
            self._send_later(exc, b"", frame, ())

    def _send_later(
        self,
        why: Busy,
        envelope: bytes,
        frame: bytes,
        buffers: Sequence[Piece],
        bounded: bool = False,
    ) -> None:
        if self._server is None:
            if envelope or bounded:
                raise Busy("the engine's queue is full") from why
            self.lane.queue(envelope, frame, buffers)
            return
        while True:
            self._pause(self._server)
            with contextlib.suppress(Busy):
                self.lane.send(envelope, frame, buffers)
                return

    def _pause(self, server: int) -> None:
        poll = select.poll()
        poll.register(server, select.POLLHUP)
        if poll.poll(PAUSE_MS):
            raise Lost("the server is gone")
        self.lane.flush()

    def close(self) -> None:
        self.lane.close()
