"""Looks: what a checkpoint holds, said in few numbers, where it lies.

A look is a job like a run: it does a layer's worth of work each time it is asked, so that others get
their turn. It changes nothing, and keeps only answers too large for a frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from djinn_zmq.engine.jobs.branches import midway_of
from djinn_zmq.engine.jobs.job import EngineSession, Job
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models import attention
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.measuring import axes_behind, norms
from djinn_zmq.engine.models.ranking import log_norm_of, top_of
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import LayerError, RequestError, SelectionError
from djinn_zmq.settings import MIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.looks import Attention, Diff, Lens, Look, Norms, Top
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.stops import NOTHING

TOP_LIMIT = MIB // 8  # ids of one answer: 8 bytes each


@dataclass(slots=True, eq=False)
class LookJob(Job):
    """A look on its way. seen: the answer's tensors; apart: those too large for a frame."""

    seen: list[torch.Tensor] = field(default_factory=list)
    apart: dict[int, Kept] = field(default_factory=dict)  # by their place in `seen`


class Looker:
    """Makes jobs of looks and works on them."""

    def __init__(self, keeping: Keeping, runner: Runner) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans
        self._views: dict[type, Any] = {
            Norms: self._norms,
            Top: self._top,
            Lens: self._lens,
            Diff: self._diff,
            Attention: self._attention,
        }

    def begin(
        self,
        asked: Look,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[LookJob, Iterator[None]]:
        """A job for a look. Raises UnknownCheckpoint, and RequestError for what cannot be seen."""
        with watch.span("decode"):
            entry = self._find(asked.view.checkpoint, session)
            if entry.session != session.id:
                raise RequestError("only a checkpoint of this session's own model can be looked at")
            layer = entry.layer
            job = LookJob(session, model, entry.ids, layer, NOTHING, shared, watch)
            work = self._views[type(asked.view)](job, entry, asked.view)
        return job, self._loans.settling(job, self._work(job, work))

    def _find(self, number: int, session: EngineSession) -> Entry:
        entry = self._keeping.find(number, session.owner)
        if entry.layer < 0:
            raise RequestError(f"{number:#x} is not a checkpoint")
        return entry

    def _work(self, job: LookJob, work: Iterator[None]) -> Iterator[None]:
        job.advance("start")
        yield from work
        for place, data in enumerate(job.seen):
            if self._loans.too_large(job, data):
                job.apart[place] = yield from self._loans.keep_in_room(job, data, -1)
                job.kept.append(job.apart[place])
        yield from self._loans.until_done(job)
        job.advance("finish")

    # ---- the views: checked when called, done when iterated

    def _norms(self, job: LookJob, entry: Entry, view: Norms) -> Iterator[None]:
        def work() -> Iterator[None]:
            hidden = yield from self._loans.lend(job, entry)
            with job.watch.span("compute"):
                job.seen.append(norms(hidden))
            yield

        return work()

    def _top(self, job: LookJob, entry: Entry, view: Top) -> Iterator[None]:
        _check_top(view.k, len(entry.ids), job.model)
        _check_between(entry)

        def work() -> Iterator[None]:
            recording = self._runner.recordings.of(job.model, job.ids)
            hidden = yield from self._loans.lend(job, entry)
            yield
            with job.watch.span("compute"):
                logits = job.model.stepper.tail(recording.ids, hidden, lent=True)[:, -1]
                job.seen += [*top_of(logits, view.k), log_norm_of(logits)]

        return work()

    def _lens(self, job: LookJob, entry: Entry, view: Lens) -> Iterator[None]:
        batch, extent = entry.ids.shape
        for position in view.positions:
            if not -extent <= position < extent:
                raise SelectionError(
                    f"position {position} of a prompt of {extent}: allowed {-extent} to {extent - 1}"
                )
        entries = sorted(self._saved_with(entry), key=lambda one: one.layer)
        if not entries:
            raise RequestError("the run keeps no checkpoint between two layers: save_at= some")
        positions = list(view.positions) or list(range(extent))
        _check_top(view.k, len(entries) * batch * len(positions), job.model)

        def work() -> Iterator[None]:
            recording = self._runner.recordings.of(job.model, job.ids)
            rows = []
            for one in entries:
                hidden = yield from self._loans.lend(job, one)
                yield
                with job.watch.span("compute"):
                    # The whole prompt, as in a run: fewer positions would round otherwise.
                    logits = job.model.stepper.tail(recording.ids, hidden, lent=True)[:, positions]
                    flat = logits.reshape(-1, logits.shape[-1])
                    found = (*top_of(flat, view.k), log_norm_of(flat))
                    rows.append([part.reshape(batch, len(positions), -1) for part in found])
            values, ids, log_norm = (torch.stack(parts) for parts in zip(*rows, strict=True))
            layers = torch.tensor([one.layer for one in entries])
            job.seen += [layers, values, ids, log_norm[..., 0]]

        return work()

    def _saved_with(self, entry: Entry) -> list[Entry]:
        """The checkpoints between two layers of *entry*'s run."""
        run, session = entry.run, entry.session
        saved = [
            one
            for one in self._keeping.entries.values()
            if (one.run, one.session) == (run, session) and one.layer >= 0
        ]
        inputs = {one.base for one in saved}  # kept for what is inside of a layer
        return [one for one in saved if not one.place and one.id not in inputs]

    def _diff(self, job: LookJob, entry: Entry, view: Diff) -> Iterator[None]:
        other = self._find(view.other, job.session)
        here, there = entry.body.tensor, other.body.tensor
        if here.shape != there.shape:
            raise RequestError(
                f"a checkpoint of shape {here.shape} and one of {there.shape} cannot be compared"
            )

        def work() -> Iterator[None]:
            one = yield from self._loans.lend(job, entry)
            two = yield from self._loans.lend(job, other)
            with job.watch.span("compute"):
                same = torch.tensor(same_bits(one, two))
                job.seen += [*_difference(one.double(), two.double()), same]
            yield

        return work()

    def _attention(self, job: LookJob, entry: Entry, view: Attention) -> Iterator[None]:
        model, layer = job.model, job.layer
        _check_between(entry)
        last = model.info.num_layers
        if not 1 <= view.layer <= last:
            raise LayerError(
                f'layer {view.layer} does not exist: "{model.info.name}" has layers 1 to {last}'
            )
        midway = midway_of(entry, job.session) if entry.past else None
        if view.layer <= layer:
            ahead = f"{layer + 1} to {last}" if layer < last else "none"
            raise LayerError(
                f"layer {view.layer} lies behind the checkpoint after layer {layer}: ahead are {ahead}"
            )

        def work() -> Iterator[None]:
            cache = None
            if midway is None:
                recording = self._runner.recordings.of(job.model, job.ids)
            else:
                branch, below = midway.branch, midway.below
                yield from self._loans.pin(job, branch.past, below)
                ids = torch.from_numpy(job.ids).to(model.device)
                caches, account = model.stepper.caches, job.session.account
                own = caches.open(branch.past, branch.static, account, below)
                recording = model.stepper.record(ids, own.cache)
                # Of a static cache some keys are not there yet, and sliding layers roll theirs.
                cache = caches.open(branch.past, 0, account, below).cache
            hidden = yield from self._loans.lend(job, entry)
            for index in range(layer, view.layer - 1):
                with job.watch.span("compute"):
                    hidden = model.stepper.step(index, hidden, recording, lent=index == layer)
                yield
            with job.watch.span("compute"):
                job.seen.append(
                    attention.weights(
                        model.stepper,
                        model.info.name,
                        view.layer - 1,
                        hidden.clone(),
                        recording.ids,
                        cache,
                    )
                )

        return work()


def _check_top(k: int, rows: int, model: ServedModel) -> None:
    vocab = model.info.vocab_size
    if not 1 <= k <= vocab:
        raise RequestError(f"the top {k} tokens: 1 to {vocab} can be asked for")
    if k * rows > TOP_LIMIT:
        raise RequestError(
            f"the top {k} tokens at {rows} places: at most {TOP_LIMIT // rows} at so many"
        )


def _check_between(entry: Entry) -> None:
    if entry.place:
        raise RequestError(
            f"the checkpoint is at {entry.place}: this look needs one between two layers"
        )


def _difference(one: torch.Tensor, two: torch.Tensor) -> list[torch.Tensor]:
    """norms, cosine, largest, place; float64 in."""
    apart = (one - two).abs()
    flat = apart.reshape(-1)
    most = int(flat.argmax())  # a NaN counts as the largest
    place = torch.tensor(np.unravel_index(most, tuple(apart.shape)))
    axes = axes_behind(one)
    lengths = [torch.linalg.vector_norm(side, dim=axes) for side in (one, two)]
    cosine = (one * two).sum(axes) / (lengths[0] * lengths[1])  # NaN where one has no length
    return [norms(one - two), cosine.float(), flat[most], place]
