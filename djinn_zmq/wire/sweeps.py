"""Sweeps: many branches in one request, answered in parts as their batches are done."""

import msgspec

from djinn_zmq.wire.edits import Edit
from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.tensors import Tensor


class Results(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What each branch sends of its last position's logits, beside their log_norm."""

    logits: str  # "last": all of them; "top": the likeliest; "none"
    top: int  # how many, for "top"
    tokens: tuple[int, ...]  # the logits of these


class Sweep(msgspec.Struct, **message(Op.SWEEP)):
    """Branches of one checkpoint, each with its own edits."""

    checkpoint: int
    branches: tuple[tuple[Edit, ...], ...]
    results: Results
    memory: int  # bytes that one batch may take; 0: the engine's own limit


class Trace(msgspec.Struct, **message(Op.TRACE)):
    """The causal-tracing grid: for each layer and group of positions, the corrupted prompt's run with
    that part of its hidden state from the clean prompt's.

    clean, corrupted: text, or ids int64 (1, positions). layers: as stops count. Cell number n is
    layer n // len(positions), group n % len(positions).
    """

    clean: str | Tensor
    corrupted: str | Tensor
    layers: tuple[int, ...]  # none: all of them, 0 to the last
    positions: tuple[tuple[int, ...], ...]  # none: each by itself
    results: Results  # tokens: none: the likeliest of the clean run, and of the corrupted one
    memory: int


class Outcomes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of n branches, each of *batch* prompts."""

    log_norm: Tensor  # float64 (n, batch): log of the sum of exp over all logits
    logits: Tensor | None  # "last": (n, batch, vocab)
    top_values: Tensor | None  # "top": (n, batch, k)
    top_ids: Tensor | None  # int64 (n, batch, k)
    tokens: Tensor | None  # (n, batch, tokens)


class Swept(msgspec.Struct, **message(Op.SWEEP)):
    """A part of a sweep's answer."""

    branches: tuple[int, ...]  # their numbers
    outcomes: Outcomes
    done: int
    total: int


class Traced(msgspec.Struct, **message(Op.TRACE)):
    """A part of a trace's answer."""

    branches: tuple[int, ...]
    outcomes: Outcomes
    done: int
    total: int


class Cost(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What was run, and what one full forward a branch would have run."""

    branches: int
    unchanged: int  # whose edit changed no bit: answered with the base's outcome
    batches: int
    layers: int  # executed, counted once for each branch (and base) that went through
    layers_full: int


class SweepReply(msgspec.Struct, **message(Op.SWEEP)):
    cost: Cost
    spans: Spans


class TraceReply(msgspec.Struct, **message(Op.TRACE)):
    layers: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    ids: Tensor  # int64 (2, positions): clean, corrupted
    base: Outcomes  # of the clean run, and of the corrupted one: n = 2
    cost: Cost
    spans: Spans


def tensors_of(outcomes: Outcomes) -> tuple[Tensor | None, ...]:
    return (
        outcomes.log_norm,
        outcomes.logits,
        outcomes.top_values,
        outcomes.top_ids,
        outcomes.tokens,
    )
