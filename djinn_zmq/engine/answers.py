"""What an engine says: answers to whoever asked, over the link or a lane, and notices to the server."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from djinn_zmq.bus.lane import Piece
from djinn_zmq.bus.link import Link
from djinn_zmq.engine.lanes import TAG, Lanes
from djinn_zmq.errors import DjinnError
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

STORED_LIMIT = 16  # answers of each session, for a retry
STORED_NBYTES = 64 * 1024  # larger answers are not stored: their request runs again
REPLY, PART = int(Flag.REPLY), int(Flag.PART)


class Answers:
    def __init__(self, link: Link, lanes: Lanes, *, rings_server: bool) -> None:
        """rings_server: ahead of an answer; it is no use where the server does not stay awake for it."""
        self._link = link
        self._rings_server = rings_server
        self._last: tuple[int, Any] = Op.PING, messages.Pong("idle")
        self._lanes = lanes
        self._stored: dict[int, OrderedDict[int, tuple[bytes, Sequence[Piece]]]] = {}

    def send(self, envelope: bytes, frame: bytes, buffers: Sequence[Piece] = ()) -> None:
        if envelope[:1] == TAG:
            self._lanes.send(envelope, frame, buffers)
        else:
            self._link.send(envelope, frame, buffers)

    def soon(self, envelope: bytes) -> None:
        """The answer will be there in the time that its client, or the server, takes to wake up: wake
        it now. The server not where there is more to do before the next answer."""
        if envelope[:1] == TAG:
            self._lanes.wake(envelope)
        elif self._rings_server and not self._link.lane.unfinished():
            self._link.lane.ring()

    def answer(
        self,
        envelope: bytes,
        header: Header,
        meta: Any,
        buffers: Sequence[Piece] = (),
        *,
        store: bool = False,
    ) -> None:
        """Answer the request *header* belongs to. store: so that asking again gets the same."""
        frame = codec.encode(
            header.op,
            meta,
            flags=REPLY,
            request=header.request,
            session=header.session,
            buffers=len(buffers),
        )
        self.send(envelope, frame, buffers)
        self._last = header.op, meta
        if store and len(frame) + sum(len(buffer) for buffer in buffers) <= STORED_NBYTES:
            stored = self._stored.setdefault(header.session, OrderedDict())
            stored[header.request] = (frame, list(buffers))
            if len(stored) > STORED_LIMIT:
                stored.popitem(last=False)

    def rehearse(self) -> None:
        """Make the last answer once more, for nobody."""
        op, meta = self._last
        codec.encode(op, meta, flags=REPLY)

    def part(self, envelope: bytes, header: Header, meta: Any, buffers: Sequence[Piece]) -> None:
        """A part of the answer; the answer itself is still to come."""
        frame = codec.encode(
            header.op,
            meta,
            flags=PART,
            request=header.request,
            session=header.session,
            buffers=len(buffers),
        )
        self.send(envelope, frame, buffers)

    def again(self, envelope: bytes, header: Header) -> bool:
        """Send the answer that *header*'s request has had already. False where none is stored."""
        stored = self._stored.get(header.session, {}).get(header.request)
        if stored is None:
            return False
        self.send(envelope, *stored)
        return True

    def forget(self, session: int) -> None:
        self._stored.pop(session, None)

    def refuse(self, envelope: bytes, header: Header, error: DjinnError) -> None:
        self.send(envelope, codec.failure(header, error))

    def tell(self, op: Op, meta: Any, session: int = 0) -> None:
        """A notice to the server: it lies there before an answer that is sent after it, and wakes the
        server after that one, when the loop rings."""
        self._link.post(codec.encode(op, meta, session=session))
