"""What a run's reply carries, and how its tensors travel."""

from collections.abc import Sequence

import numpy as np
import torch

from djinn_zmq.engine.keeping import NAMES
from djinn_zmq.engine.runs import Job
from djinn_zmq.wire.messages import RunReply, TokensReply
from djinn_zmq.wire.tensors import INLINE_LIMIT, Frame, Inline, Tensor, inline

Buffers = list[bytes | memoryview]


def of_run(job: Job) -> tuple[RunReply, Buffers]:
    """The reply to a RUN or RESUME."""
    buffers: Buffers = []
    logits = top_values = top_ids = top_log_norm = None
    logits_id = 0
    with job.watch.span("encode"):
        checkpoints = tuple(job.kept)
        ids = _place(job.ids, buffers)
        if job.logits_kept is not None:
            logits, logits_id = job.logits_kept.tensor, job.logits_kept.id
        elif job.logits is not None and job.wanted.logits == "top":
            values, indices = _top(job.logits, job.wanted.top)
            norm = job.logits.double().logsumexp(-1)
            top_values = _place_torch(values, buffers)
            top_ids = _place_torch(indices, buffers)
            top_log_norm = _place_torch(norm, buffers)
        elif job.logits is not None:
            logits = _place_torch(job.logits, buffers)
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
    )
    return reply, buffers


def of_tokens(ids: np.ndarray, pieces: Sequence[str]) -> tuple[TokensReply, Buffers]:
    buffers: Buffers = []
    return TokensReply(_place(ids, buffers), tuple(pieces)), buffers


def ids_inline(job: Job) -> Tensor:
    """The job's token ids inside the meta: they outlive this process in the server's books."""
    return inline(job.ids)


def _top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The *count* largest of each row and their ids, of equals the lower id first.

    logits: (batch, vocab). torch.topk leaves the order of equals open, and bfloat16 has many.
    """
    chosen = []
    for row in logits:
        least = row.topk(count).values[-1]
        ids = (~(row < least)).nonzero()[:, 0]
        order = row[ids].argsort(descending=True, stable=True)
        chosen.append(ids[order[:count]])
    ids = torch.stack(chosen)
    return logits.gather(-1, ids), ids


def _place(array: np.ndarray, buffers: Buffers) -> Tensor:
    """*array* inside the meta if it is small, else as one more buffer."""
    if array.nbytes <= INLINE_LIMIT:
        return inline(array)
    buffers.append(array.tobytes())
    return Tensor(array.dtype.name, array.shape, Frame(len(buffers) - 1))


def _place_torch(data: torch.Tensor, buffers: Buffers) -> Tensor:
    raw = data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    name, shape = NAMES[data.dtype], tuple(data.shape)
    if len(raw) <= INLINE_LIMIT:
        return Tensor(name, shape, Inline(raw))
    buffers.append(raw)
    return Tensor(name, shape, Frame(len(buffers) - 1))
