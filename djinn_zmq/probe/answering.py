"""What an engine does when the last span of a run is closed, and no span can tell of any more: it makes the
answer, and tells the server before that what it keeps, unless it has done so while the span was open, as
where a resume stops where it begins.

The very messages of one resume are made here and put into a lane, and those of a no-op beside them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.link import Link
from djinn_zmq.bus.poll import Poll
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.stops import wanted_of
from djinn_zmq.probe.rounds import Case
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

Clocked = Callable[[], float]  # returns the seconds that it took
ENVELOPE = bytes(9)  # whose answer it is: as long as a lane's


@contextmanager
def answering(
    point: Checkpoint, model: Model, *, ready: bool, passed_on: bool
) -> Iterator[tuple[Clocked, Clocked]]:
    """Calls that make a resume's answer, and a no-op's. For `told_clock`.

    ready: the resume stops where it begins. passed_on: the answer goes through the server, which
    takes what it is told first, and that counts too.
    """
    reply: Message = model.drive(_resume(point, model, ready))
    notice = _notice(point, model, reply)
    settings = model.connection.settings
    theirs, ends = Link.create(settings)
    link = Link(Lane(ends, settings, first=False))
    server = _Taking(theirs)

    def answer(op: Op, meta: Any, buffers: Sequence[Any]) -> None:
        frame = codec.encode(op, meta, flags=Flag.REPLY, request=1 << 40, session=model.session_id,
                             buffers=len(buffers))  # fmt: skip
        link.send(ENVELOPE, frame, buffers)

    def tell() -> None:
        if notice is not None:
            link.post(codec.encode(Op.KEEP, notice, session=model.session_id))

    def clocked(op: Op, meta: Any, buffers: Sequence[Any], before: Case, within: Case) -> Clocked:
        def call() -> float:
            before()
            begin_ns = time.perf_counter_ns()
            within()
            answer(op, meta, buffers)
            made_ns = time.perf_counter_ns()
            server.take()
            return ((time.perf_counter_ns() if passed_on else made_ns) - begin_ns) / 1e9

        return call

    told = (tell, _nothing) if ready else (_nothing, tell)
    try:
        yield (
            clocked(Op.RESUME, reply.meta, reply.buffers, *told),
            clocked(Op.PING, messages.Pong("idle", 10_000), (), _nothing, _nothing),
        )
    finally:
        server.close()
        theirs.close()
        link.close()
        model.connection.give_back(reply)


class _Taking:
    """Takes what comes over the link as the server does."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._answered = False
        self._poll = Poll()
        self._poll.watch_lane(link.lane, self._take_one)

    def take(self) -> None:
        """Until an answer has been taken, and what was told before it."""
        self._answered = False
        while not self._answered:
            self._poll.turn(0)

    def _take_one(self) -> bool:
        pieces = self._link.receive()
        if pieces is not None:
            if pieces[0]:
                codec.peek(pieces[1])
                self._answered = True
            else:
                codec.decode(pieces[1])
        return self._link.lane.unfinished()

    def close(self) -> None:
        self._poll.close()


def _nothing() -> None:
    pass


def _resume(point: Checkpoint, model: Model, ready: bool) -> Operation[Message]:
    stop_at, logits = (point.layer, "none") if ready else (None, "last")
    wanted = wanted_of(stop_at, (), logits, point.layer, model.num_layers)
    meta = messages.Resume(point.id, None, (), wanted)
    return (yield Call(Op.RESUME, meta, session=model.session_id))


def _notice(point: Checkpoint, model: Model, reply: Message) -> messages.Keep | None:
    """What the server was told with *reply*; None where nothing is kept."""
    meta: messages.RunReply = reply.meta
    kept = meta.checkpoints
    if meta.logits_id and meta.logits is not None:
        kept += (messages.Kept(meta.logits_id, model.session_id, meta.run, -1, meta.logits),)
    return messages.Keep(None, kept) if kept else None  # of ids that it knows
