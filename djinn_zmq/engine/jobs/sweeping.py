"""Sweeps: many branches of one checkpoint as batches.

Every branch is checked before the first runs. A sweep too large for memory is cut into batches; what
they come to is handed out as soon as it is known, and the client's own pace holds the next batch back.
"""

from collections.abc import Callable, Generator, Sequence

import torch

from djinn_zmq.engine.jobs import inside
from djinn_zmq.engine.jobs.batches import PastRows, Rows, Step, through
from djinn_zmq.engine.jobs.batching import Batching, check_results, timed
from djinn_zmq.engine.jobs.branches import Midway, midway_of
from djinn_zmq.engine.jobs.grids import SweepJob
from djinn_zmq.engine.jobs.job import EngineSession, Given, Turns
from djinn_zmq.engine.models import editing
from djinn_zmq.engine.models.caches import Working
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.places import Place
from djinn_zmq.engine.state.keeping import Entry
from djinn_zmq.errors import EditError, RequestError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.edits import Edit, Skip
from djinn_zmq.wire.stops import NOTHING
from djinn_zmq.wire.sweeps import Sweep, Swept


class Sweeper(Batching):
    """Makes jobs of sweeps and works on them."""

    def sweep(
        self,
        asked: Sweep,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[SweepJob, Turns]:
        """Raises UnknownCheckpoint, EditError naming the branch, SweepTooLarge; nothing has run."""
        with watch.span("decode"):
            entry = self._keeping.find(asked.checkpoint, session.owner)
            if entry.layer < 0 or entry.session != session.id:
                raise RequestError("only a checkpoint of this session's own model can be swept")
            midway = midway_of(entry, session) if entry.past else None
            if not asked.branches:
                raise RequestError("a sweep of no branches")
            check_results(asked.results, model, len(entry.ids))
            past_nbytes = 0 if midway is None else _past_nbytes(midway, entry.layer)
            at_once = self.at_once(model, entry.ids.shape, asked.memory, past_nbytes)
            place = self._runner.place_of(entry, model)
            job = SweepJob(
                session,
                model,
                entry.ids,
                entry.layer,
                NOTHING,
                shared,
                watch,
                results=asked.results,
                total=len(asked.branches),
            )
            edits = tuple(edit for branch in asked.branches for edit in branch)
            self._runner.loans.read(job, None, edits)
            sources = self._runner.sources(session, edits)
            rests = self._runner.rests(entry, session)
            self._runner.loans.hold(job, [entry, *sources.values(), *rests])
            ready = self._ready(job, entry, asked.branches, buffers, sources)
            work = self._sweep(job, rests, entry, place, midway, ready, at_once)
        return job, self._runner.loans.settling(job, work)

    def _ready(
        self,
        job: SweepJob,
        entry: Entry,
        branches: tuple[tuple[Edit, ...], ...],
        buffers: Sequence[bytes | memoryview],
        sources: dict[int, Entry],
    ) -> Generator[None, None, list[editing.Ready]]:
        """All edits of all branches, checked."""
        value = yield from self._runner.loans.lend(job, entry)
        for source in sources.values():
            yield from self._runner.loans.lend(job, source)
        found = []
        with job.watch.span("edit"):
            for number, edits in enumerate(branches):
                try:
                    if any(isinstance(edit, Skip) for edit in edits):
                        raise EditError("a Skip in a sweep: use resume")
                    found.append(self._runner.ready(edits, value, buffers, job.session, sources))
                except EditError as exc:
                    raise EditError(f"branch {number}: {exc}") from exc
        if job.sent:  # before the first part of the answer
            yield from self._runner.loans.until_done(job)
            job.sent = ()
        return found

    def _sweep(
        self,
        job: SweepJob,
        rests: Sequence[Entry],
        entry: Entry,
        place: Place | None,
        midway: Midway | None,
        checking: Generator[None, None, list[editing.Ready]],
        at_once: int,
    ) -> Turns:
        """rests: inside of a layer, what *entry* rests on, nearest first. midway: the past that it
        goes on from, where there is one."""
        job.advance("start")
        ready = yield from checking
        value = yield from self._runner.loans.lend(job, entry)
        base, before = value, []
        for rest in rests:
            base = yield from self._runner.loans.lend(job, rest)
            if rest.place:
                before.insert(0, Given(self._runner.named(rest.place, job.model), base))
        rows: Rows | PastRows
        if midway is None:
            rows = self.rows_of(job.model, job.ids, job)
        else:
            yield from self._runner.loans.pin(job, midway.branch.past, midway.below)
            rows = _rows_behind(job, midway)
        depth = job.model.stepper.num_layers
        for first in range(0, len(ready), at_once):
            chunk = ready[first : first + at_once]
            with job.watch.span("record"):
                rows.begin(len(chunk))
            with job.watch.span("edit"):
                edited = _copies(value, len(chunk))
                extent = len(value)
                for number, changes in enumerate(chunk):
                    editing.carry_out(changes, edited[number * extent : (number + 1) * extent])
            begin = edited if place is None else _copies(base, len(chunk))
            given = [Given(one.place, _copies(one.value, len(chunk))) for one in before]
            step = self._step(job, rows, [*given, Given(place, edited)])
            joining = _joining(job.layer, begin)
            logits = yield from timed(
                job, through(rows, joining, job.layer, depth, job.counted, step)
            )
            numbers = range(first, first + len(chunk))
            yield from self.parts(job, Swept, list(numbers), logits)
        yield from self._runner.loans.until_done(job)
        job.advance("finish")

    def _step(self, job: SweepJob, rows: Rows | PastRows, given: Sequence[Given]) -> Step:
        """From a checkpoint inside a layer, that layer runs with the edited values handed in."""
        place = given[-1].place
        if place is None:
            return rows.step

        def step(index: int, hidden: torch.Tensor) -> torch.Tensor:
            if index != place.zone:
                return rows.step(index, hidden)
            return inside.handed_in(job, given, lambda: rows.step(index, hidden))

        return step


def _rows_behind(job: SweepJob, midway: Midway) -> PastRows:
    caches, branch = job.model.stepper.caches, midway.branch
    account = job.session.account

    def open() -> Working:
        return caches.open(branch.past, branch.static, account, midway.below)

    return PastRows(job.model, torch.from_numpy(job.ids).to(job.model.device), open)


def _past_nbytes(midway: Midway, layer: int) -> int:
    """What the layers from *layer* on hold of the past, for each row of a batch."""
    past, static = midway.branch.past, midway.branch.static
    nbytes = sum(one.nbytes for node in past.chain() for one in node.segments[layer:])
    return nbytes if not static else nbytes * static // max(1, past.length)


def _copies(data: torch.Tensor, count: int) -> torch.Tensor:
    """*count* of them behind one another along the first axis."""
    return data.repeat(count, *[1] * (data.ndim - 1))


def _joining(layer: int, rows: torch.Tensor) -> Callable[[int], torch.Tensor | None]:
    return lambda at: rows if at == layer else None
