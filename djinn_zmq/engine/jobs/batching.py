"""What sweeps and traces share: rows for their batches, turns, and parts to answer with."""

from collections.abc import Generator, Iterator

import numpy as np
import torch

from djinn_zmq.engine.jobs.batches import Rows, rows_at_once
from djinn_zmq.engine.jobs.grids import SweepJob
from djinn_zmq.engine.jobs.job import Job, Part
from djinn_zmq.engine.jobs.loans import FRAME_LIMIT
from djinn_zmq.engine.jobs.replies import Buffers, nbytes_of, outcomes_of
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import RequestError
from djinn_zmq.settings import counted, format_bytes
from djinn_zmq.wire.sweeps import Results, Swept, Traced

OUTCOMES_NBYTES = FRAME_LIMIT  # of one part: what it holds travels in frames


class Batching:
    """Makes jobs that work in batches."""

    def __init__(self, keeping: Keeping, runner: Runner) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans
        self._rows: dict[tuple[str, int], bool] = {}

    def at_once(
        self,
        model: ServedModel,
        shape: tuple[int, ...],
        memory: int,
        past_nbytes: int = 0,
        held_nbytes: int = 0,
    ) -> int:
        """As `rows_at_once`."""
        free = self._keeping.device.free_nbytes()
        return rows_at_once(model, shape[0], shape[1], memory, free, past_nbytes, held_nbytes)

    def rows_of(self, model: ServedModel, ids: np.ndarray, job: Job) -> Rows:
        key = (model.info.name, ids.shape[1])
        with job.watch.span("record"):
            rows = Rows(model, self._runner.recordings.of(model, ids), self._rows.get(key))
        self._rows[key] = rows.free
        return rows

    def parts(
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


def timed(
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


def check_results(results: Results, model: ServedModel, rows: int) -> None:
    """rows: prompts whose outcomes travel together in any case, each kind of number in a frame.

    Raises RequestError for what cannot be wanted of their logits, or is more than a frame carries.
    """
    vocab = model.info.vocab_size
    if results.logits not in ("last", "top", "none"):
        raise RequestError(f'logits "{results.logits}" of a sweep: "last", "none" or a number')
    if results.logits == "top" and not 1 <= results.top <= vocab:
        raise RequestError(f"the top {results.top} logits: 1 to {vocab} can be asked for")
    for token in results.tokens:
        if not 0 <= token < vocab:
            raise RequestError(f'token {token}: "{model.info.name}" has ids 0 to {vocab - 1}')
    size = model.stepper.model.dtype.itemsize
    whole = vocab * size if results.logits == "last" else 0
    top = 8 * results.top if results.logits == "top" else 0  # int64 ids
    nbytes = rows * max(whole, top, size * len(results.tokens))
    if nbytes > FRAME_LIMIT:
        raise RequestError(
            f"what is wanted of the logits takes {format_bytes(nbytes)} for {counted(rows, 'prompt')}, a part of "
            f"an answer at most {format_bytes(FRAME_LIMIT)}: ask for the likeliest, logits=20 say, or for fewer"
        )
