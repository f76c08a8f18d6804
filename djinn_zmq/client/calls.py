"""What a client asks, apart from how it travels: operations are generators that yield `Call`s and are
sent the replies. `connection` carries them.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from djinn_zmq.bus.lane import Lane
from djinn_zmq.errors import DjinnError
from djinn_zmq.settings import MIB
from djinn_zmq.wire import messages
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.ops import TO_ENGINE, Op

T = TypeVar("T")
Progress = Callable[[messages.Progress], None]

PIECE = 1 * MIB  # bulk to and from a remote server goes in messages of this size
LOOK_S = 0.5  # a waiting client looks this often whether its server still lives
CLOSE_S = 2.0  # for no longer it is waited until a session is closed


class Arriving:
    """The parts of one answer that have come, and how many were taken since more were asked for."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.parts: deque[Message] = deque()
        self.taken = 0


class Call(msgspec.Struct, eq=False):  # not a dataclass: that is made in Python, with each request
    """One request. data: what an UPLOAD sends behind it, in pieces.

    parts: how many parts of its answer may be under way at once; 0: it is answered in one.
    lane: the way it took; None: the bus.
    held_s: for how long a debugger has held what was asked, which does not count; held_since: now it
    does, from then on (perf_counter seconds).
    sent_ns, arrived_ns: when it was on its way, and when its reply had come (perf_counter_ns).
    reply: what came, or why nothing will; arriving: where its answer comes in parts.
    """

    op: Op
    meta: msgspec.Struct
    session: int = 0
    buffers: Sequence[bytes | memoryview] = ()
    timeout_s: float | None = None
    progress: Progress | None = None
    data: memoryview | None = None
    parts: int = 0
    lane: Lane | None = None
    held_s: float = 0.0
    held_since: float | None = None
    sent_ns: int = 0
    arrived_ns: int = 0
    reply: Message | DjinnError | None = None
    arriving: Arriving | None = None

    def waits_until(self) -> float | None:
        """When its client gives up waiting (perf_counter seconds): so long after it was sent, and a while
        more where the engine is to say first that it has given up."""
        if self.timeout_s is None:
            return None
        more_s = 2 * LOOK_S if self.op in TO_ENGINE else 0.0
        return self.sent_ns / 1e9 + self.timeout_s + more_s

    def hold(self, held: bool) -> None:
        """A debugger holds it from now on, or does no more: meanwhile its time stands still."""
        now = time.perf_counter()
        if self.held_since is not None:
            self.held_s += now - self.held_since
        self.held_since = now if held else None

    def late(self, limit_s: float | None) -> bool:
        """Has its client waited long enough? limit_s: of `waits_until`."""
        if limit_s is None or self.held_since is not None:
            return False
        return time.perf_counter() > limit_s + self.held_s


@dataclass(slots=True, eq=False)
class Next:
    """The next part of an answer whose call was sent before, or the reply that ends it; None where
    neither has come after *timeout_s*."""

    request: int
    timeout_s: float | None = None


@dataclass(slots=True, eq=False)
class Heard:
    """Something has come on *subscriber*, or LOOK_S have passed."""

    subscriber: Any  # a bus.news.Subscriber: a room that only those who listen need


Step = Call | list[Call] | Next | Heard
Operation = Generator[Step, Any, T]
