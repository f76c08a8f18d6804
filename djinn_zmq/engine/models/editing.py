"""Carrying out edits on a hidden state, in place, in the order given.

Arithmetic in float32 (float64 for float64), one rounding at the end. Where an edit adds nothing the
old bits stay: -0.0 + 0.0 would be +0.0.
"""

from collections.abc import Callable
from typing import Any

import torch

from djinn_zmq.errors import EditError, SelectionError
from djinn_zmq.wire.edits import (
    Add,
    Edit,
    Lerp,
    Patch,
    Project,
    Scale,
    Set,
    Zero,
    selection,
    tensors_in,
)
from djinn_zmq.wire.tensors import Tensor

FLOATS = ("float16", "bfloat16", "float32", "float64")
Values = Callable[[Tensor], torch.Tensor]  # a wire tensor's values, on the hidden state's device
Source = Callable[[int], torch.Tensor]  # a checkpoint's hidden state, read only
Change = Callable[[torch.Tensor], torch.Tensor]  # the part an edit chose → what replaces it

Ready = list[tuple[tuple[Any, ...], Change]]


def prepared(
    hidden: torch.Tensor, edits: tuple[Edit, ...], values: Values, source: Source
) -> Ready:
    """*edits*, checked and ready for `carry_out` on any tensor that is as *hidden*: (batch, positions,
    hidden_size), or as the module has it.

    Every edit is checked before the first is done. Raises EditError naming the edit's place.
    """
    ready = []
    for place, edit in enumerate(edits):
        name = f"edit {place} ({type(edit).__name__})"
        try:
            chosen = selection(edit.at, tuple(hidden.shape))
            _no_place_twice(chosen)
            ready.append((chosen, _prepare(edit, hidden, chosen, values, source)))
        except (EditError, SelectionError) as exc:
            raise EditError(f"{name}: {exc}") from exc
    return ready


def carry_out(ready: Ready, hidden: torch.Tensor) -> torch.Tensor:
    """Make the edits on *hidden*, and return it."""
    for chosen, change in ready:
        hidden[chosen] = change(hidden[chosen])
    return hidden


def _no_place_twice(chosen: tuple[Any, ...]) -> None:
    """Which of two values a place gets is not defined on every device."""
    for axis, places in enumerate(chosen):
        if isinstance(places, list) and len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise EditError(f"position {twice} of axis {axis} is chosen twice")


def _prepare(
    edit: Edit, hidden: torch.Tensor, chosen: Any, values: Values, source: Source
) -> Change:
    """The change an edit makes to its part of hidden."""
    part = hidden[chosen]
    for tensor in tensors_in((edit,)):
        if tensor.dtype not in FLOATS:
            raise EditError(f"values of dtype {tensor.dtype}: floats are needed")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(edit, Zero):
        return torch.zeros_like
    if isinstance(edit, Scale):
        factor = edit.factor
        return lambda old: old if factor == 1.0 else (old.to(wide) * factor).to(old.dtype)
    if isinstance(edit, Patch):
        return _patch(edit, part, source)
    if isinstance(edit, Project):
        return _project(values(edit.direction), part, wide)
    value = _fitting(values(edit.value), part)
    if isinstance(edit, Add):
        addend = value.to(wide)
        return lambda old: torch.where(addend == 0, old, (old.to(wide) + addend).to(old.dtype))
    if isinstance(edit, Set):
        return lambda old: value.to(old.dtype).expand(old.shape)
    assert isinstance(edit, Lerp)
    return _lerp(value.to(wide), edit.weight, wide)


def _lerp(target: torch.Tensor, weight: float, wide: torch.dtype) -> Change:
    def change(old: torch.Tensor) -> torch.Tensor:
        if weight == 0.0:
            return old
        if weight == 1.0:  # old + (target - old) would miss the target by a rounding
            return target.expand(old.shape).to(old.dtype)
        widened = old.to(wide)
        # Not torch.lerp: it takes another formula from weight 0.5 on.
        return (widened + weight * (target - widened)).to(old.dtype)

    return change


def _fitting(value: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    try:
        torch.broadcast_to(value, part.shape)
    except RuntimeError as exc:
        raise EditError(
            f"a value of shape {tuple(value.shape)} does not fit the part of shape "
            f"{tuple(part.shape)} that `at` chooses"
        ) from exc
    return value


def _patch(edit: Patch, part: torch.Tensor, source: Source) -> Change:
    whole = source(edit.source)
    if whole.dtype != part.dtype:
        raise EditError(f"the source is {_name(whole)}, the checkpoint {_name(part)}")
    taken = whole[selection(edit.source_at, tuple(whole.shape), "the source")]
    if taken.shape != part.shape:
        raise EditError(
            f"the source's part has shape {tuple(taken.shape)}, the part to patch "
            f"{tuple(part.shape)}"
        )
    kept = taken.clone()  # the source may be evicted or released before the change is made
    return lambda old: kept


def _project(direction: torch.Tensor, part: torch.Tensor, wide: torch.dtype) -> Change:
    if not part.ndim:
        raise EditError("`at` chooses a single number: a direction needs an axis")
    width = part.shape[-1]
    if direction.ndim != 1 or direction.shape[0] != width:
        raise EditError(
            f"a direction of shape {tuple(direction.shape)}: the part that `at` chooses needs "
            f"({width},)"
        )
    exact = direction.double()
    largest = exact.abs().max()
    if not torch.isfinite(largest):
        raise EditError("a direction that is not finite")
    if not largest:
        raise EditError("a direction of length zero")
    exact = exact / largest  # else the squares of large and small values over- and underflow
    unit = (exact / torch.linalg.vector_norm(exact)).to(wide)

    def change(old: torch.Tensor) -> torch.Tensor:
        widened = old.to(wide)
        return (widened - (widened @ unit).unsqueeze(-1) * unit).to(old.dtype)

    return change


def _name(data: torch.Tensor) -> str:
    return str(data.dtype).removeprefix("torch.")
