"""Finding out which client is gone, when libzmq says only that a connection has ended.

A knock is a message to every peer that could be meant; the ROUTER refuses those that are gone. The
event may come before the ROUTER itself knows, so there are later knocks, too.
"""

import time
from collections.abc import Iterator

KNOCKS_S = (0.0, 0.05, 1.0)  # after the event


class Knocks:
    def __init__(self) -> None:
        self._due: dict[bytes, list[float]] = {}  # by router: when to knock, monotonic
        self.due_s = float("inf")

    def plan(self, tag: bytes) -> None:
        """A connection of the router *tag* has ended."""
        now = time.monotonic()
        self._due[tag] = [now + after_s for after_s in KNOCKS_S]
        self._set()

    def take_due(self) -> Iterator[bytes]:
        """The routers at whose peers to knock now."""
        now = time.monotonic()
        for tag, due in self._due.items():
            if due and due[0] <= now:
                due[:] = [at for at in due if at > now]
                yield tag
        self._set()

    def _set(self) -> None:
        self.due_s = min((due[0] for due in self._due.values() if due), default=float("inf"))
