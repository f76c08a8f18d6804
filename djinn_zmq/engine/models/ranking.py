"""The likeliest tokens of many rows of logits."""

import torch


def top_of(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The *count* largest of each row and their ids, of equals the lower id first.

    logits: (rows, vocab). torch.topk leaves the order of equals open, and bfloat16 has many.
    """
    values, ids = logits.topk(count)
    ids = ids.sort(-1).values
    order = logits.gather(-1, ids).argsort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    # Where more than *count* are as large as the last, topk chose among equals.
    tied = (~(logits < values[:, -1:])).sum(-1) > count
    for row in tied.nonzero()[:, 0].tolist():
        fit = (~(logits[row] < values[row, -1])).nonzero()[:, 0]
        order = logits[row][fit].argsort(descending=True, stable=True)
        ids[row] = fit[order[:count]]
    return logits.gather(-1, ids), ids


def log_norm_of(logits: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp over each row: logits (rows, vocab) → float64 (rows,)"""
    return logits.double().logsumexp(-1)
