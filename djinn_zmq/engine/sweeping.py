"""Sweeps: many branches of one checkpoint, and the causal-tracing grid, as batches.

Every branch is checked before the first runs. A sweep too large for memory is cut into batches; what
they come to is handed out as soon as it is known, and the client's own pace holds the next batch back.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch

from djinn_zmq.engine import editing, inside
from djinn_zmq.engine.batches import PastRows, Rows, Step, rows_at_once, through
from djinn_zmq.engine.branches import Midway, midway_of
from djinn_zmq.engine.caches import Working
from djinn_zmq.engine.grids import SweepJob, TraceJob
from djinn_zmq.engine.jobs import EngineSession, Given, Job, Part, Turns
from djinn_zmq.engine.keeping import Entry, Keeping
from djinn_zmq.engine.models import ServedModel
from djinn_zmq.engine.places import Place
from djinn_zmq.engine.replies import Buffers, nbytes_of, outcomes_of
from djinn_zmq.engine.runs import FRAME_LIMIT, Runner
from djinn_zmq.engine.stepping import same_rows
from djinn_zmq.errors import EditError, LayerError, PromptError, RequestError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.edits import Edit, Skip
from djinn_zmq.wire.messages import Wanted
from djinn_zmq.wire.sweeps import Results, Sweep, Swept, Trace, Traced
from djinn_zmq.wire.tensors import Tensor

NO_RUN = Wanted(None, (), "none", 0)
OUTCOMES_NBYTES = FRAME_LIMIT  # of one part: what it holds travels in frames


class Sweeper:
    """Makes jobs of sweeps and works on them."""

    def __init__(self, keeping: Keeping, runner: Runner) -> None:
        self._keeping = keeping
        self._runner = runner
        self._rows: dict[tuple[str, int], bool] = {}

    # ---- branches of one checkpoint

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
            _check_results(asked.results, model)
            past_nbytes = 0 if midway is None else _past_nbytes(midway, entry.layer)
            at_once = self._at_once(model, entry.ids.shape, asked.memory, past_nbytes)
            place = self._runner.place_of(entry, model)
            job = SweepJob(
                session,
                model,
                entry.ids,
                entry.layer,
                NO_RUN,
                shared,
                watch,
                results=asked.results,
                total=len(asked.branches),
            )
            edits = tuple(edit for branch in asked.branches for edit in branch)
            sources = self._runner.sources(session, edits)
            rests = self._runner.rests(entry, session)
            self._runner.hold(job, [entry, *sources.values(), *rests])
            ready = self._ready(job, entry, asked.branches, buffers, sources)
            work = self._sweep(job, rests, entry, place, midway, ready, at_once)
        return job, self._runner.settling(job, work)

    def _at_once(
        self, model: ServedModel, shape: tuple[int, ...], memory: int, past_nbytes: int = 0
    ) -> int:
        free = self._keeping.device.free_nbytes()
        return rows_at_once(model, shape[0], shape[1], memory, free, past_nbytes)

    def _ready(
        self,
        job: SweepJob,
        entry: Entry,
        branches: tuple[tuple[Edit, ...], ...],
        buffers: Sequence[bytes | memoryview],
        sources: dict[int, Entry],
    ) -> Generator[None, None, list[editing.Ready]]:
        """All edits of all branches, checked."""
        value = yield from self._runner.lend(job, entry)
        for source in sources.values():
            yield from self._runner.lend(job, source)
        found = []
        with job.watch.span("edit"):
            for number, edits in enumerate(branches):
                try:
                    if any(isinstance(edit, Skip) for edit in edits):
                        raise EditError("a Skip in a sweep: use resume")
                    found.append(self._runner.ready(edits, value, buffers, job.session, sources))
                except EditError as exc:
                    raise EditError(f"branch {number}: {exc}") from exc
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
        value = yield from self._runner.lend(job, entry)
        base, before = value, []
        for rest in rests:
            base = yield from self._runner.lend(job, rest)
            if rest.place:
                before.insert(0, Given(self._runner.named(rest.place, job.model), base))
        rows: Rows | PastRows
        if midway is None:
            rows = self._rows_of(job.model, job.ids, job)
        else:
            yield from self._runner.pin(job, midway.branch.past, midway.below)
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
            logits = yield from _timed(
                job, through(rows, joining, job.layer, depth, job.counted, step)
            )
            numbers = range(first, first + len(chunk))
            yield from self._parts(job, Swept, list(numbers), logits)
        yield from self._runner.until_done(job)
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

    def _rows_of(self, model: ServedModel, ids: np.ndarray, job: Job) -> Rows:
        key = (model.info.name, ids.shape[1])
        with job.watch.span("record"):
            rows = Rows(model, self._runner.recording_of(model, ids), self._rows.get(key))
        self._rows[key] = rows.free
        return rows

    # ---- the grid of layers and positions

    def trace(
        self,
        asked: Trace,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[TraceJob, Turns]:
        """Raises PromptError, LayerError, RequestError, SweepTooLarge; nothing has run."""
        with watch.span("decode"):
            both = [
                self._ids(one, buffers, session, model) for one in (asked.clean, asked.corrupted)
            ]
            lengths = [ids.shape[1] for ids in both]
            if lengths[0] != lengths[1]:
                raise PromptError(
                    f"the clean prompt has {lengths[0]} tokens, the corrupted one {lengths[1]}: "
                    "their positions must match"
                )
            layers = _layers(asked.layers, model)
            positions = _positions(asked.positions, lengths[0])
            _check_results(asked.results, model)
            at_once = self._at_once(model, (1, lengths[0]), asked.memory)
        job = TraceJob(
            session,
            model,
            np.concatenate(both),
            0,
            NO_RUN,
            shared,
            watch,
            results=asked.results,
            total=len(layers) * len(positions),
            layers=layers,
            positions=positions,
        )
        return job, self._runner.settling(job, self._trace(job, at_once))

    def _ids(
        self,
        prompt: str | Tensor,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
    ) -> np.ndarray:
        if isinstance(prompt, str):
            ids = model.encode((prompt,))
        else:
            ids = self._keeping.ids_sent(prompt, buffers, session.owner)
        model.check_ids(ids)
        if len(ids) != 1:
            raise PromptError(f"{len(ids)} prompts: a trace takes one clean and one corrupted")
        return ids

    def _trace(self, job: TraceJob, at_once: int) -> Turns:
        job.advance("start")
        depth = job.model.stepper.num_layers
        hidden = yield from self._both(job)
        assert job.base is not None
        if not job.results.tokens:
            likeliest = job.base.argmax(-1).tolist()
            job.results = Results(job.results.logits, job.results.top, tuple(likeliest))
        cells = [(layer, group) for layer in job.layers for group in job.positions]
        changed: list[int] = []
        same: list[int] = []
        alike = {layer: same_rows(*hidden[layer]).tolist() for layer in job.layers}
        for number, (layer, group) in enumerate(cells):
            unchanged = all(alike[layer][position] for position in group)
            (same if unchanged else changed).append(number)
        job.unchanged = len(same)
        if same:
            yield from self._parts(job, Traced, same, job.base[1:].expand(len(same), -1))
        rows = self._rows_of(job.model, job.ids[1:], job)
        for first in range(0, len(changed), at_once):
            chunk = changed[first : first + at_once]
            joining = _patched([cells[number] for number in chunk], hidden)
            begin = cells[chunk[0]][0]
            logits = yield from _timed(
                job, through(rows, joining, begin, depth, job.counted, rows.step)
            )
            yield from self._parts(job, Traced, chunk, logits)
        yield from self._runner.until_done(job)
        job.advance("finish")

    def _both(self, job: TraceJob) -> Generator[None, None, dict[int, torch.Tensor]]:
        """Both prompts run to the end; their hidden states (2, positions, hidden_size) by layer."""
        stepper = job.model.stepper
        with job.watch.span("record"):
            recording = self._runner.recording_of(job.model, job.ids)
        hidden = recording.embedded.clone()
        found = {0: hidden.clone()}
        for index in range(stepper.num_layers):
            yield
            with job.watch.span("compute"):
                hidden = stepper.step(index, hidden, recording)
                job.counted.layers += 2
                if index + 1 in job.layers:
                    found[index + 1] = hidden.clone()
        with job.watch.span("compute"):
            job.base = stepper.tail(recording.ids, hidden, last=True)[:, -1]
        return found

    # ---- what they come to

    def _parts(
        self, job: SweepJob, kind: type[Swept | Traced], numbers: list[int], logits: torch.Tensor
    ) -> Iterator[Part]:
        """logits: (branches · batch, vocab), of the branches *numbers*."""
        batch = len(logits) // len(numbers)
        each = batch * nbytes_of(job.results, logits)
        size = max(1, OUTCOMES_NBYTES // each)
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            buffers: Buffers = []
            with job.watch.span("encode"):
                chosen = logits[first * batch : (first + len(part)) * batch]
                outcomes = outcomes_of(chosen, batch, job.results, buffers)
            job.done += len(part)
            yield Part(kind(tuple(part), outcomes, job.done, job.total), buffers)


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


def _patched(
    cells: list[tuple[int, tuple[int, ...]]], hidden: dict[int, torch.Tensor]
) -> Callable[[int], torch.Tensor | None]:
    """The rows that begin at a layer: the corrupted prompt's, each with its positions clean."""

    def joining(layer: int) -> torch.Tensor | None:
        groups = [group for at, group in cells if at == layer]
        if not groups:
            return None
        clean, corrupted = hidden[layer]
        rows = corrupted.repeat(len(groups), 1, 1)
        row = torch.tensor([n for n, group in enumerate(groups) for _ in group])
        column = torch.tensor([position for group in groups for position in group])
        rows[row, column] = clean[column]
        return rows

    return joining


def _timed(
    job: Job, work: Generator[None, None, torch.Tensor]
) -> Generator[None, None, torch.Tensor]:
    """*work*, the time between its yields counted as compute."""
    while True:
        try:
            with job.watch.span("compute"):
                next(work)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits
        yield


def _check_results(results: Results, model: ServedModel) -> None:
    vocab = model.info.vocab_size
    if results.logits not in ("last", "top", "none"):
        raise RequestError(f'logits "{results.logits}" of a sweep: "last", "none" or a number')
    if results.logits == "top" and not 1 <= results.top <= vocab:
        raise RequestError(f"the top {results.top} logits: 1 to {vocab} can be asked for")
    for token in results.tokens:
        if not 0 <= token < vocab:
            raise RequestError(f'token {token}: "{model.info.name}" has ids 0 to {vocab - 1}')


def _layers(asked: tuple[int, ...], model: ServedModel) -> tuple[int, ...]:
    depth = model.info.num_layers
    for layer in asked:
        if not 0 <= layer <= depth:
            raise LayerError(
                f'layer {layer} does not exist: "{model.info.name}" has {depth} layers (0-{depth})'
            )
    return tuple(sorted(set(asked))) or tuple(range(depth + 1))


def _positions(asked: tuple[tuple[int, ...], ...], extent: int) -> tuple[tuple[int, ...], ...]:
    """Counted from the start."""
    for group in asked:
        if not group:
            raise RequestError("a group of no positions")
        for position in group:
            if not -extent <= position < extent:
                raise RequestError(
                    f"position {position} of a prompt of {extent}: allowed {-extent} to {extent - 1}"
                )
    found = [tuple(position % extent for position in group) for group in asked]
    return tuple(found) or tuple((position,) for position in range(extent))
