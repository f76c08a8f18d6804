"""Conversations: runs and generations that go on from a past, which the engine holds.

A branch is where a session stands behind a finished request; RELEASE gives it up.
"""

import msgspec

from djinn_zmq.wire.edits import Edit
from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.stops import Wanted
from djinn_zmq.wire.tensors import Tensor
from djinn_zmq.wire.tiers import Kept


class Continue(msgspec.Struct, **message(Op.CONTINUE)):
    """One forward pass over *text*, or over *ids*: int64 (1, positions), behind a branch's tokens."""

    branch: int  # of this session; 0: its beginning
    static: int  # of a conversation that begins: positions of its static cache; 0: it grows
    text: str
    ids: Tensor | None
    wanted: Wanted


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a token is drawn, as transformers' `generate` would."""

    temperature: float  # 0: the likeliest, the lowest id of equals
    top_k: int  # 0: all
    top_p: float  # 1: all
    seed: int | None  # None: go on with the branch's own generator


class Generate(msgspec.Struct, **message(Op.GENERATE)):
    """Go on from a branch, or from a checkpoint, with *text* or *ids*, and then token by token.

    A checkpoint's run is finished first, with *hidden* and *edits* as in RESUME.
    """

    branch: int
    static: int
    checkpoint: int  # 0: none
    hidden: Tensor | None
    edits: tuple[Edit, ...]
    text: str
    ids: Tensor | None  # int64 (1, positions)
    wanted: Wanted  # in each of the steps; logits, top: of each token
    steps: tuple[int, ...]  # that `wanted` stops and saves in; none: all of them
    max_new_tokens: int  # 0: as many as there is room for
    sampling: Sampling
    ends: tuple[int, ...] | None  # tokens behind which it ends; None: the model's own


class Token(msgspec.Struct, **message(Op.GENERATE)):
    """A part of a GENERATE's answer: a token, and what its forward saved."""

    before: Tensor | None  # with the first: int64 (1, positions), all tokens before it
    step: int  # tokens of this generation before it
    id: int
    text: str  # what it adds to the text so far; "" within a character, or without a tokenizer
    log_probability: float  # natural logarithm, in the model's own distribution
    log_norm: float  # log of the sum of exp over all logits
    logits: Tensor | None  # "last": (1, vocab)
    top_values: Tensor | None  # (1, k)
    top_ids: Tensor | None
    checkpoints: tuple[Kept, ...]


class Generated(msgspec.Struct, **message(Op.GENERATE)):
    run: int
    state: str
    reason: str  # "length", "end": a token of `ends`; "stop"
    step: int  # tokens generated; of a stop: its step
    layer: int
    ids: Tensor  # int64 (1, positions): all tokens of the branch
    checkpoints: tuple[Kept, ...]  # of a stop's step
    branch: int  # 0 where it stopped
    spans: Spans


class Held(msgspec.Struct, **message(Op.HELD)):
    """A session's keys and values take *nbytes*. how: "evict" or "prefetch", where so many of them
    (*moved*) have just gone to host memory, or come back."""

    nbytes: int
    how: str = ""
    moved: int = 0
    elapsed_ns: int = 0
