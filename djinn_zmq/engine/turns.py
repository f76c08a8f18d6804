"""Whose turn it is: sessions share the device by time, and a newcomer need not wait for a crowd.

Each session has a clock of the time it was worked for. The next layer goes to the run whose session
is furthest behind. A session that comes back from idling starts a little behind all others (so a
short run passes between two layers of a long one), but never keeps time it did not use.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from djinn_zmq.engine.runs import EngineSession, Job
from djinn_zmq.wire.codec import Header

HEAD_START_NS = 50_000_000


@dataclass(slots=True, eq=False)
class Active:
    """A job that gets turns, and whom to answer."""

    job: Job
    turns: Iterator[None]
    envelope: bytes
    header: Header

    @property
    def overdue(self) -> bool:
        limit_ms = self.header.deadline_ms
        return bool(limit_ms) and self.job.watch.elapsed_ns() > limit_ms * 1_000_000


class Turns:
    def __init__(self) -> None:
        self._active: list[Active] = []

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, active: Active) -> None:
        session = active.job.session
        if self._active and all(one.job.session is not session for one in self._active):
            behind = min(one.job.session.worked_ns for one in self._active) - HEAD_START_NS
            session.worked_ns = max(session.worked_ns, behind)
        self._active.append(active)

    def next(self) -> Active:
        """The job to work on; among equals the one that has waited longest."""
        return min(self._active, key=_worked_ns)

    def worked(self, active: Active, elapsed_ns: int) -> None:
        active.job.session.worked_ns += elapsed_ns
        # Behind its session's other jobs, so that they take turns too.
        if active in self._active:
            self._active.remove(active)
            self._active.append(active)

    def remove(self, active: Active) -> None:
        self._active.remove(active)

    def of(self, session: EngineSession | int) -> list[Active]:
        """The active jobs of a session."""
        number = session if isinstance(session, int) else session.id
        return [one for one in self._active if one.job.session.id == number]


def _worked_ns(active: Active) -> int:
    return active.job.session.worked_ns
