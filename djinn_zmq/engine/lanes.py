"""The lanes of an engine: clients that speak to it without the server in between.

The server says which lane is whose. What comes over one is as hostile as what comes over the bus: it
is copied before it is looked at, checked like any request, and may concern sessions of the lane's
own owner only. A client that lies about its ring, or does not read its answers, loses the lane, and
the server drops it.
"""

import logging
import time
from collections.abc import Callable, Sequence

from djinn_zmq.bus.lane import Ends, Lane, Piece
from djinn_zmq.bus.lease import close_all
from djinn_zmq.bus.poll import Poll
from djinn_zmq.errors import Busy, ProtocolError
from djinn_zmq.settings import Settings
from djinn_zmq.wire.codec import OP
from djinn_zmq.wire.messages import Listen
from djinn_zmq.wire.ops import Op

_log = logging.getLogger(__name__)

PING = bytes([Op.PING])
TAG = b"l"  # first byte of a lane's envelope; the server's begin with others
# Envelope, owner, frame, buffers, and when it was there.
Take = Callable[[bytes, str, bytes, Sequence[Piece], int], None]


class Lanes:
    def __init__(
        self, poll: Poll, settings: Settings, take: Take, on_broken: Callable[[int, str], None]
    ) -> None:
        """take: gets each message. on_broken: is told of a lane whose client is of no use."""
        self._poll = poll
        self._settings = settings
        self._take = take
        self._on_broken = on_broken
        self._lanes: dict[bytes, Lane] = {}
        self._pids: dict[bytes, int] = {}

    def listen(self, news: Listen, fds: Sequence[int]) -> None:
        """From now on, take what comes over this lane. Takes over *fds*."""
        envelope = TAG + news.lane.to_bytes(8, "little")
        try:
            if len(fds) != len(Ends._fields):  # more than we may have open
                close_all(fds)
                raise ProtocolError(f"a lane came with {len(fds)} descriptors")
            lane = Lane(Ends(*fds), self._settings, first=False)
        except (ProtocolError, OSError) as exc:  # it may be memory that cannot be mapped
            self._break(envelope, str(exc))
            return
        self._lanes[envelope], self._pids[envelope] = lane, news.pid
        self._poll.watch_lane(lane, self._on_lane, lane, envelope, news.owner)

    def _on_lane(self, lane: Lane, envelope: bytes, owner: str) -> bool:
        try:
            frames = lane.receive()
            if frames is not None:
                begin_ns = time.perf_counter_ns()
                _, frame, buffers = frames
                if frame[OP] == PING:
                    lane.ring()  # ahead of the answer: its client wakes while that is made
                self._take(envelope, owner, frame, buffers, begin_ns)
        except ProtocolError as exc:
            self._break(envelope, str(exc))
        return lane.unfinished()

    def send(self, envelope: bytes, frame: bytes, buffers: Sequence[Piece]) -> None:
        """Answer over the lane *envelope* names; nobody is told where that is gone."""
        lane = self._lanes.get(envelope)
        if lane is None:
            return
        try:
            lane.send(b"", frame, buffers)
        except (Busy, ProtocolError) as exc:
            self._break(envelope, str(exc))

    def wake(self, envelope: bytes) -> None:
        """Ring ahead of an answer over the lane *envelope* names."""
        lane = self._lanes.get(envelope)
        if lane is not None:
            lane.ring()

    def pid(self, envelope: bytes) -> int:
        """Of the process at the other end of the lane *envelope* names; 0: it is gone."""
        return self._pids.get(envelope, 0)

    def close(self, number: int) -> None:
        """The client at its other end is gone."""
        self._drop(TAG + number.to_bytes(8, "little"))

    def _break(self, envelope: bytes, text: str) -> None:
        _log.warning("a lane is given up: %s", text)
        self._drop(envelope)
        self._on_broken(int.from_bytes(envelope[1:], "little"), text)

    def _drop(self, envelope: bytes) -> None:
        lane = self._lanes.pop(envelope, None)
        if lane is not None:
            del self._pids[envelope]
            self._poll.unwatch(lane)
            lane.close()

    def close_all(self) -> None:
        for envelope in list(self._lanes):
            self._drop(envelope)
