"""Looks: what can be asked of a checkpoint without fetching it. Small answers travel, tensors stay.

A LOOK's answer is a list of tensors, in the order each view names them.
"""

import msgspec

from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.tensors import Tensor


class Norms(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """→ float32 (batch, positions): the L2 norm of each position's hidden state"""

    checkpoint: int


class Top(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """→ values (batch, k), ids int64 (batch, k), log_norm float64 (batch,)

    The likeliest next tokens if the model's own tail came now. values: logits, in the model's
    dtype. log_norm: log of the sum of exp over all logits.
    """

    checkpoint: int
    k: int


class Lens(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """→ layers int64 (layers,), values (layers, batch, positions, k), ids int64 of that shape,
    log_norm float64 (layers, batch, positions)

    The same for every checkpoint between two layers that the checkpoint's run still keeps.
    """

    checkpoint: int
    positions: tuple[int, ...]  # none: all of them
    k: int


class Diff(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """→ norms float32 (batch, positions), cosine float32 (batch, positions), largest float64 (),
    place int64 (rank,), same bool ()

    norms: of checkpoint - other. largest: the largest absolute difference, at *place*. same: bit
    for bit.
    """

    checkpoint: int
    other: int


class Attention(msgspec.Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    """→ weights (batch, heads, positions, positions), in the dtype the model computes them in

    layer: as stops count: the layer after which a stop at this number comes.
    """

    checkpoint: int
    layer: int


View = Norms | Top | Lens | Diff | Attention


class Look(msgspec.Struct, **message(Op.LOOK)):
    view: View


class Seen(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    tensor: Tensor
    id: int  # where it is kept in a slot: to READ and RELEASE it; else 0


class LookReply(msgspec.Struct, **message(Op.LOOK)):
    seen: tuple[Seen, ...]
    spans: Spans
