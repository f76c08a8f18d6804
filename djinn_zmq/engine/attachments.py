"""One debugger on one session: where that one's jobs are held, and what is kept there for it."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from djinn_zmq.engine.jobs import inside
from djinn_zmq.engine.jobs.job import EngineSession, Given, Halt, Halting, Job
from djinn_zmq.engine.jobs.plans import Plan, Start
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.places import BEFORE, Place
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import DjinnError
from djinn_zmq.wire import messages
from djinn_zmq.wire.attach import Stopped
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.stops import Break


@dataclass(slots=True, eq=False)
class Attachment:
    """One debugger on one session: what `job.Attached` says."""

    debugger: EngineSession
    target: EngineSession
    envelope: bytes
    header: Header  # of the ATTACH
    credit: int
    runner: Runner
    keeping: Keeping
    fail: Callable[["Attachment", DjinnError], None]
    breaks: tuple[Break, ...] = ()
    stops: int = 0
    waiting: deque[tuple[Stopped, list[bytes | memoryview]]] = field(default_factory=deque)
    over: bool = False

    def plan(self, job: Job, start: Start, known: Plan | None) -> Plan | None:
        if self.over or not self.breaks:
            return None
        if known is not None and known.asked is self.breaks:
            return known
        try:
            plan = self.runner.planner.holds(self.breaks, start, job.model, job.ids)
        except DjinnError as exc:
            self.fail(self, exc)
            return None
        plan.asked = self.breaks
        return plan

    def halt(
        self, job: Job, value: torch.Tensor, place: Place | None, rests: Sequence[Given]
    ) -> Halting:
        if self.over:
            return value
        halt = Halt(job, [], value)
        if place is not None and place.zone == BEFORE:
            halt.fixed = (
                f"{place.path}: what runs before the layers can be looked at here, and edited at 0"
            )
        try:
            yield from self._keep(halt, value, place, rests)
        except BaseException as exc:  # its program's giving up meanwhile is one
            self.keeping.drop([kept.id for kept in halt.kept])
            if not isinstance(exc, DjinnError):
                raise
            self.fail(self, exc)
            return value
        yield halt
        return halt.value

    def _keep(
        self, halt: Halt, value: torch.Tensor, place: Place | None, rests: Sequence[Given]
    ) -> Iterator[None]:
        job, owner = halt.job, self.debugger.owner
        nbytes = value.nbytes + sum(rest.value.nbytes for rest in rests)
        if not self.keeping.fits(nbytes, owner):
            yield from self.keeping.make_room(nbytes, owner)
        kept = self.keeping.entries
        held: list[Entry] = []
        try:
            with job.watch.span("copy"):

                def keep(*args: object, **where: object) -> Generator[None, None, messages.Kept]:
                    one = self.runner.loans.keep_for(self.debugger, *args, **where)  # type: ignore[arg-type]
                    held.append(kept[one.id])
                    self.keeping.hold(held[-1])  # it stays where it is until that has been told
                    return one
                    yield  # there is room for all of them by now

                base = yield from inside.keep_rests(job, rests, keep, halt.kept)
                path = "" if place is None else place.path
                halt.kept.append((yield from keep(job, value, job.layer, place=path, base=base)))
            yield from self.runner.loans.until_done(job)
        finally:
            for entry in held:
                self.keeping.let_go(entry)
