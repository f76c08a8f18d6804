"""What happened, for whoever asks or listens: the one place where events are made.

A bounded list in memory. `listeners` are told of each event at once.
"""

import time
from collections import deque
from collections.abc import Callable

from djinn_zmq.wire.tiers import Event

KEPT = 4096  # events that are still known

Listener = Callable[[Event, str], None]  # told an event, and whose it is ("": everybody's)


class Journal:
    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self._events: deque[tuple[Event, str]] = deque(maxlen=KEPT)
        self._last = 0

    def tell(
        self,
        kind: str,
        text: str,
        *,
        owner: str = "",
        session: int = 0,
        nbytes: int = 0,
        elapsed_ns: int = 0,
    ) -> None:
        """owner: who alone may know of it; "": everybody may."""
        self._last += 1
        event = Event(self._last, time.time(), kind, session, text, nbytes, elapsed_ns)
        self._events.append((event, owner))
        for listener in self.listeners:
            listener(event, owner)

    def after(self, number: int, owner: str, limit: int) -> tuple[Event, ...]:
        """The first *limit* events behind *number* that *owner* may know of."""
        if number >= self._last:
            return ()
        found = (
            event for event, whose in self._events if event.number > number and whose in ("", owner)
        )
        return tuple(event for event, _ in zip(found, range(limit), strict=False))
