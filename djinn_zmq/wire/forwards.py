"""A program's own forwards: what transformers' `forward` takes and gives, the past staying on the server.

For `djinn_zmq.hf`, behind which a program calls a served model as it would call its own.
"""

from collections.abc import Iterator

import msgspec

from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.tensors import Tensor


class Select(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """The past's rows in this order, some of them left out or more than once: beams."""

    rows: Tensor  # int64 (n,)


class Repeat(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """Each of the past's rows so often, side by side."""

    times: int


class Crop(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """The past without its last *count* positions."""

    count: int


Change = Select | Repeat | Crop


class Forward(msgspec.Struct, **message(Op.FORWARD)):
    """One call of the model's forward, behind a past that an earlier one gave.

    The past named stays as it is; *changes* are made, in order, for this call.
    """

    past: int  # 0: none
    changes: tuple[Change, ...]
    ids: Tensor  # int64 (batch, positions)
    mask: Tensor | None  # attention_mask, as the model takes it
    positions: Tensor | None  # position_ids: int64
    labels: Tensor | None  # int64, as ids
    keep: int | Tensor  # logits_to_keep: so many of the last positions, 0: all; or these
    cached: bool  # use_cache: keep its keys and values, as a new past
    hidden: bool  # output_hidden_states


def tensors_of(asked: Forward) -> Iterator[Tensor | None]:
    yield from (asked.ids, asked.mask, asked.positions, asked.labels)
    yield asked.keep if isinstance(asked.keep, Tensor) else None
    yield from (change.rows for change in asked.changes if isinstance(change, Select))


class Output(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor of what the forward gives. id: where it is kept in a slot: to READ and RELEASE; else 0."""

    name: str
    place: int  # in the tuple of that name; -1: it is none
    tensor: Tensor
    id: int


class Forwarded(msgspec.Struct, **message(Op.FORWARD)):
    run: int
    kind: str  # the class of transformers' output
    outputs: tuple[Output, ...]
    past: int  # with this call's positions; 0: none was wanted
    length: int  # positions of it
    spans: Spans


class Card(msgspec.Struct, **message(Op.CARD)):
    """What a program needs of the session's model to make its config and tokenizer."""


class File(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str  # without a directory
    pieces: tuple[Tensor, ...]  # uint8 (n,) each, one behind the other


class CardReply(msgspec.Struct, **message(Op.CARD)):
    files: tuple[File, ...]  # as transformers names them: config.json, tokenizer.json, …
    attention: str  # the implementation the model runs with
