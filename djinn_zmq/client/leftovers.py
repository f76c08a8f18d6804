"""What engines keep for this client that nobody here refers to any more, and how they are told of it.

with a resume that takes a lane    `Connection.released_beside`: costs no message
ahead of any other request         a RELEASE for each session, or a CLOSE of the whole of it
"""

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from djinn_zmq.bus.lane import Lane
from djinn_zmq.client.lanes import Lanes
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.wire import messages
from djinn_zmq.wire.forwards import Forwarded
from djinn_zmq.wire.looks import LookReply
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.talks import Generated, Token
from djinn_zmq.wire.tiers import HoldReply, RestoreReply

AT_ONCE = 32  # with a request; what is more goes ahead of it
MESSAGE_LIMIT = 4096  # in a message of their own: 9 bytes each

Say = Callable[[int, msgspec.Struct, int, Lane | None], None]


class Leftovers:
    def __init__(self, sharing: Sharing, lanes: Lanes, say: Say) -> None:
        """say: sends (op, meta, session, lane), which is not answered; raises Busy."""
        self._sharing = sharing
        self._lanes = lanes
        self._say = say
        self.noted: deque[tuple[int, int]] = deque()  # (session, number), to be said

    def add(self, session: int, number: int) -> None:
        """Nobody refers to what *session* keeps under *number* any more; 0: to the session. Safe to call
        from a finalizer."""
        self.noted.append((session, number))

    def take(self, session: int) -> tuple[int, ...]:
        """At most AT_ONCE of *session*'s numbers, which the caller says."""
        numbers: list[int] = []
        others: list[tuple[int, int]] = []
        while self.noted and len(numbers) < AT_ONCE:
            of, number = self.noted.popleft()
            if of == session and number:
                numbers.append(number)
            else:
                others.append((of, number))
        self.noted.extend(others)
        self._sharing.settle()  # after they are taken: as in `say`
        return tuple(numbers)

    def say(self) -> None:
        """Say all of it. What raises Busy, or a KeyboardInterrupt, has left the rest for the next time."""
        by_session: dict[int, list[int]] = {}
        while self.noted:
            session, number = self.noted.popleft()
            by_session.setdefault(session, []).append(number)
        self._sharing.settle()  # after they are taken: what ends from now on is said next time
        pieces: list[tuple[int, list[int]]] = []
        for session, found in by_session.items():
            numbers = [0] if 0 in found else found  # the session itself is forgotten, and all of it
            for at in range(0, len(numbers), MESSAGE_LIMIT):
                pieces.append((session, numbers[at : at + MESSAGE_LIMIT]))
        while pieces:
            session, numbers = pieces[-1]
            try:
                if numbers == [0]:
                    self._lanes.forget(session)
                    self._say(Op.CLOSE, messages.Close(), session, None)
                else:
                    meta = messages.Release(tuple(numbers))
                    self._say(Op.RELEASE, meta, session, self._lanes.of(session))
            except BaseException:
                self.noted.extend((s, number) for s, some in pieces for number in some)
                raise
            pieces.pop()


def kept_by(meta: object) -> Iterator[int]:
    """The numbers of all that a reply with *meta* brings its client: checkpoints, logits, branches,
    holds. Of a reply that nobody takes they are left over."""
    if isinstance(meta, messages.RunReply):
        yield from (kept.id for kept in meta.checkpoints)
        yield from filter(None, (meta.logits_id, meta.branch))
    elif isinstance(meta, (Token, Generated)):
        yield from (kept.id for kept in meta.checkpoints)
        if isinstance(meta, Generated) and meta.branch:
            yield meta.branch
    elif isinstance(meta, LookReply):
        yield from (seen.id for seen in meta.seen if seen.id)
    elif isinstance(meta, Forwarded):
        yield from filter(None, (meta.past, *(output.id for output in meta.outputs)))
    elif isinstance(meta, messages.Uploaded):
        yield meta.id
    elif isinstance(meta, HoldReply):
        yield meta.hold
    elif isinstance(meta, RestoreReply):
        yield meta.kept.id
