"""Causal tracing: the grid of layers and positions, as batches.

Each cell is the corrupted prompt's run with the clean one's hidden state after a layer, at some positions.
Cells join their batch at their layer; where what is patched in changes no bit, nothing is run.
"""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from djinn_zmq.engine.jobs.batches import hidden_nbytes, through
from djinn_zmq.engine.jobs.batching import Batching, check_results, timed
from djinn_zmq.engine.jobs.grids import TraceJob
from djinn_zmq.engine.jobs.job import EngineSession, Turns
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import same_rows
from djinn_zmq.errors import LayerError, PromptError, RequestError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.stops import NOTHING
from djinn_zmq.wire.sweeps import Results, Trace, Traced
from djinn_zmq.wire.tensors import Tensor


class Tracer(Batching):
    """Makes jobs of traces and works on them."""

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
            check_results(asked.results, model, len(both))
            held = 2 * len(layers) * hidden_nbytes(model, lengths[0])  # until the last cell
            at_once = self.at_once(model, (1, lengths[0]), asked.memory, held_nbytes=held)
        job = TraceJob(
            session,
            model,
            np.concatenate(both),
            0,
            NOTHING,
            shared,
            watch,
            results=asked.results,
            total=len(layers) * len(positions),
            layers=layers,
            positions=positions,
        )
        return job, self._loans.settling(job, self._trace(job, at_once))

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
            yield from self.parts(job, Traced, same, job.base[1:].expand(len(same), -1))
        rows = self.rows_of(job.model, job.ids[1:], job)
        for first in range(0, len(changed), at_once):
            chunk = changed[first : first + at_once]
            joining = _patched([cells[number] for number in chunk], hidden)
            begin = cells[chunk[0]][0]
            logits = yield from timed(
                job, through(rows, joining, begin, depth, job.counted, rows.step)
            )
            yield from self.parts(job, Traced, chunk, logits)
        yield from self._loans.until_done(job)
        job.advance("finish")

    def _both(self, job: TraceJob) -> Generator[None, None, dict[int, torch.Tensor]]:
        """Both prompts run to the end; their hidden states (2, positions, hidden_size) by layer."""
        stepper = job.model.stepper
        with job.watch.span("record"):
            recording = self._runner.recordings.of(job.model, job.ids)
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
