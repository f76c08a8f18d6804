"""What a run's reply carries, and how its tensors travel."""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from djinn_zmq.engine.jobs.branches import ForwardJob, TalkJob
from djinn_zmq.engine.jobs.grids import SweepJob, TraceJob
from djinn_zmq.engine.jobs.job import DoneJob, Job
from djinn_zmq.engine.jobs.loans import FRAME_LIMIT
from djinn_zmq.engine.jobs.looking import LookJob
from djinn_zmq.engine.jobs.moving import HoldJob, MoveJob, RestoreJob
from djinn_zmq.engine.models.ranking import log_norm_of, top_of
from djinn_zmq.engine.state.keeping import NAMES
from djinn_zmq.errors import RunError
from djinn_zmq.settings import format_bytes
from djinn_zmq.wire.forwards import Forwarded, Output
from djinn_zmq.wire.looks import LookReply, Seen
from djinn_zmq.wire.messages import RunReply, TokensReply
from djinn_zmq.wire.sweeps import Outcomes, Results, SweepReply, TraceReply
from djinn_zmq.wire.talks import Generated, Token
from djinn_zmq.wire.tensors import INLINE_LIMIT, Frame, Inline, Tensor, inline

Buffers = list[bytes | memoryview]


def of(job: Job) -> tuple[msgspec.Struct, Buffers]:
    """What *job* has come to."""
    if isinstance(job, ForwardJob):
        return of_forward(job)
    if isinstance(job, TalkJob) and job.asked is not None:
        return of_generation(job)
    if isinstance(job, (MoveJob, HoldJob, RestoreJob, DoneJob)):
        return job.reply(), []
    if isinstance(job, SweepJob):
        return of_sweep(job)
    return of_look(job) if isinstance(job, LookJob) else of_run(job)


def of_run(job: Job) -> tuple[RunReply, Buffers]:
    """The reply to a RUN, RESUME or CONTINUE."""
    buffers: Buffers = []
    logits = top_values = top_ids = top_log_norm = None
    logits_id = 0
    with job.watch.span("encode"):
        checkpoints = tuple(job.kept)
        ids = None if job.ids_known else place(job.ids, buffers)
        if job.logits_kept is not None:
            logits, logits_id = job.logits_kept.tensor, job.logits_kept.id
        elif job.logits is not None and job.wanted.logits == "top":
            values, indices = top_of(job.logits, job.wanted.top)
            norm = log_norm_of(job.logits)
            top_values = place_torch(values, buffers)
            top_ids = place_torch(indices, buffers)
            top_log_norm = place_torch(norm, buffers)
        elif job.logits is not None:
            logits = place_torch(job.logits, buffers)
    reply = RunReply(
        run=job.id,
        state=str(job.state),
        layer=job.layer,
        ids=ids,
        checkpoints=checkpoints,
        logits=logits,
        logits_id=logits_id,
        top_values=top_values,
        top_ids=top_ids,
        top_log_norm=top_log_norm,
        spans=job.watch.with_rest("queue", first=True),
        branch=job.branch,
    )
    return reply, buffers


def of_token(job: TalkJob, token: int, logits: torch.Tensor) -> tuple[Token, Buffers]:
    """A part of the reply to a GENERATE. logits: (1, vocab), of which *token* was drawn."""
    assert job.step is not None and job.spelling is not None and job.asked is not None
    buffers: Buffers = []
    wanted = job.asked.wanted
    top = top_of(logits, wanted.top) if wanted.logits == "top" else None
    norm = float(log_norm_of(logits)[0])
    meta = Token(
        before=None if job.begun else place(job.tokens, buffers),
        step=job.step,
        id=token,
        text=job.spelling.add(token),
        log_probability=float(logits[0, token].double()) - norm,
        log_norm=norm,
        logits=place_torch(logits, buffers) if wanted.logits == "last" else None,
        top_values=None if top is None else place_torch(top[0], buffers),
        top_ids=None if top is None else place_torch(top[1], buffers),
        checkpoints=tuple(job.kept),
    )
    return meta, buffers


def of_generation(job: TalkJob) -> tuple[Generated, Buffers]:
    """The reply to a GENERATE."""
    buffers: Buffers = []
    reply = Generated(
        run=job.id,
        state=str(job.state),
        reason=job.reason,
        step=job.step or 0,
        layer=job.layer,
        ids=place(job.tokens, buffers),
        checkpoints=tuple(job.kept),
        branch=job.branch,
        spans=job.watch.with_rest("queue", first=True),
    )
    return reply, buffers


def of_forward(job: ForwardJob) -> tuple[Forwarded, Buffers]:
    """The reply to a FORWARD."""
    buffers: Buffers = []
    with job.watch.span("encode"):
        outputs = tuple(
            Output(name, place, job.apart[index].tensor, job.apart[index].id)
            if index in job.apart
            else Output(name, place, place_torch(data, buffers), 0)
            for index, (name, place, data) in enumerate(job.outcome)
        )
    length = job.tokens.shape[1] if job.call.cached else 0
    spans = job.watch.with_rest("queue", first=True)
    return Forwarded(job.id, job.kind, outputs, job.branch, length, spans), buffers


def of_look(job: LookJob) -> tuple[LookReply, Buffers]:
    """The reply to a LOOK."""
    buffers: Buffers = []
    with job.watch.span("encode"):
        seen = [
            Seen(job.apart[place].tensor, job.apart[place].id)
            if place in job.apart
            else Seen(place_torch(data, buffers), 0)
            for place, data in enumerate(job.seen)
        ]
    return LookReply(tuple(seen), job.watch.with_rest("queue", first=True)), buffers


def of_sweep(job: SweepJob) -> tuple[SweepReply | TraceReply, Buffers]:
    """The reply to a SWEEP or TRACE, behind all of its parts."""
    buffers: Buffers = []
    spans = job.watch.with_rest("queue", first=True)
    if not isinstance(job, TraceJob):
        return SweepReply(job.cost, spans), buffers
    assert job.base is not None
    ids, base = place(job.ids, buffers), outcomes_of(job.base, 1, job.results, buffers)
    reply = TraceReply(job.layers, job.positions, job.results.tokens, ids, base, job.cost, spans)
    return reply, buffers


def nbytes_of(results: Results, logits: torch.Tensor) -> int:
    """Of one prompt's outcome."""
    whole = logits.shape[-1] if results.logits == "last" else 0
    top = results.top if results.logits == "top" else 0
    return 8 + 8 * top + (whole + top + len(results.tokens)) * logits.element_size()


def outcomes_of(logits: torch.Tensor, batch: int, results: Results, buffers: Buffers) -> Outcomes:
    """logits: (branches · batch, vocab)"""

    def shaped(data: torch.Tensor) -> Tensor:
        return place_torch(data.reshape(-1, batch, *data.shape[1:]), buffers)

    top = top_of(logits, results.top) if results.logits == "top" else None
    return Outcomes(
        log_norm=shaped(log_norm_of(logits)),
        logits=shaped(logits) if results.logits == "last" else None,
        top_values=None if top is None else shaped(top[0]),
        top_ids=None if top is None else shaped(top[1]),
        tokens=shaped(logits[:, list(results.tokens)]) if results.tokens else None,
    )


def of_tokens(ids: np.ndarray, pieces: Sequence[str]) -> tuple[TokensReply, Buffers]:
    buffers: Buffers = []
    return TokensReply(place(ids, buffers), tuple(pieces)), buffers


def place(array: np.ndarray, buffers: Buffers) -> Tensor:
    """*array* inside the meta if it is small, else as one more buffer."""
    if array.nbytes <= INLINE_LIMIT:
        return inline(array)
    if array.nbytes > FRAME_LIMIT:
        raise _too_large(array.nbytes)
    buffers.append(array.tobytes())
    return Tensor(array.dtype.name, array.shape, Frame(len(buffers) - 1))


def place_torch(data: torch.Tensor, buffers: Buffers) -> Tensor:
    raw = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    name, shape, nbytes = NAMES[data.dtype], tuple(data.shape), len(raw)
    if nbytes <= INLINE_LIMIT:
        return Tensor(name, shape, Inline(raw))
    if nbytes > FRAME_LIMIT:
        raise _too_large(nbytes)
    buffers.append(raw)
    return Tensor(name, shape, Frame(len(buffers) - 1))


def _too_large(nbytes: int) -> RunError:
    """Of a tensor that no frame carries: who gets one all the same takes its sender's memory for damaged."""
    return RunError(
        f"an answer with a tensor of {format_bytes(nbytes)}: at most {format_bytes(FRAME_LIMIT)} fit a frame"
    )
