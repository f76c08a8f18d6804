"""Whose turn it is: sessions share the device by time, and a newcomer need not wait for a crowd.

Each session has a clock of the time it was worked for. The next layer goes to the run whose session
is furthest behind. A session that comes back from idling starts a little behind all others (so a
short run passes between two layers of a long one), but never keeps time it did not use: where there
are no others it starts where the one that has had most is.

A job whose answer comes in parts pauses where its client takes no more of them, and gets no turns
until it does: a slow reader makes no queue grow, here or on the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from djinn_zmq.engine.jobs.job import EngineSession, Halt, Job, Part
from djinn_zmq.wire.codec import Header

HEAD_START_NS = 50_000_000
LONGEST_S = 86_400.0  # of a wait: epoll takes 24 days, a deadline may be seven weeks away


@dataclass(slots=True, eq=False)
class Active:
    """A job that gets turns, and whom to answer."""

    job: Job
    turns: Iterator[Part | Halt | None]
    envelope: bytes
    header: Header
    credit: int = 0  # parts that its client still takes
    held: Part | Halt | None = None  # made, and still to be taken: the job is paused
    halt: Halt | None = None  # by which a debugger holds it
    held_ns: int = 0  # for which it was, before

    @property
    def left_s(self) -> float:
        """Seconds until its deadline; negative once that has passed. It stands still while a
        debugger holds the job."""
        limit_ms = self.header.deadline_ms
        if not limit_ms or self.halt is not None:
            return float("inf")
        return limit_ms / 1e3 - (self.job.watch.elapsed_ns() - self.held_ns) / 1e9

    @property
    def ready(self) -> bool:
        return self.halt is None and (self.held is None or self.left_s < 0)


class Turns:
    def __init__(self) -> None:
        self._active: list[Active] = []
        # The clock that is furthest ahead: who comes when nobody works begins there.
        self._latest_ns = 0

    def __bool__(self) -> bool:
        """Is there a job to work on?"""
        return bool(self._active) and any(active.ready for active in self._active)

    def until_s(self) -> float | None:
        """How long there is nothing to do, as far as is known, or LONGEST_S: 0 where there is; None: no
        end."""
        if not self._active:
            return None
        left_s = min((0 if one.ready else one.left_s for one in self._active), default=float("inf"))
        return None if left_s == float("inf") else max(0, min(left_s, LONGEST_S))

    def add(self, active: Active) -> None:
        self.welcome(active.job.session)
        self._active.append(active)

    def welcome(self, session: EngineSession) -> None:
        """*session* comes, or comes back from a pause: take from it the time it did not use."""
        working = [one.job.session.worked_ns for one in self._active if one.ready]
        behind = min(working) - HEAD_START_NS if working else self._latest_ns
        session.worked_ns = max(session.worked_ns, behind)

    def next(self) -> Active:
        """The job to work on; among equals the one that has waited longest."""
        return min((one for one in self._active if one.ready), key=_worked_ns)

    def worked(self, active: Active, elapsed_ns: int) -> None:
        session = active.job.session
        session.worked_ns += elapsed_ns
        self._latest_ns = max(self._latest_ns, session.worked_ns)
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
