"""Edits as data: what to do to an activation, where, and with which values.

An edit says `at` which part of hidden (batch, position, channel) it works, in numpy's own index
notation, and is carried out on the engine in the order given. The client's `edits` are where people
make them.

Arithmetic is done in float32 (float64 for float64 activations) and rounded once to the activation's
dtype. Where an edit adds nothing (a zero in Add, a weight 0 in Lerp, a factor 1 in Scale) the
activation keeps its bits, the sign of a zero included.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from djinn_zmq.errors import SelectionError
from djinn_zmq.wire.tensors import Tensor


class Pick(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    at: int


class Stretch(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    start: int | None
    stop: int | None
    step: int | None


class Take(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    at: tuple[int, ...]


class Rest(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """numpy's `...`"""


Index = tuple[Pick | Stretch | Take | Rest, ...]


class Add(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """hidden[at] += value"""

    value: Tensor
    at: Index


class Set(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """hidden[at] = value"""

    value: Tensor
    at: Index


class Scale(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """hidden[at] *= factor"""

    factor: float
    at: Index


class Zero(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """hidden[at] = 0"""

    at: Index


class Project(msgspec.Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    """hidden[at] -= (hidden[at] · d) d, with d the unit vector along *direction*"""

    direction: Tensor
    at: Index


class Lerp(msgspec.Struct, frozen=True, array_like=True, tag=5, forbid_unknown_fields=True):
    """hidden[at] += weight * (value - hidden[at])"""

    value: Tensor
    weight: float
    at: Index


class Patch(msgspec.Struct, frozen=True, array_like=True, tag=6, forbid_unknown_fields=True):
    """hidden[at] = the source checkpoint's hidden[source_at]"""

    source: int
    at: Index
    source_at: Index


class Skip(msgspec.Struct, frozen=True, array_like=True, tag=7, forbid_unknown_fields=True):
    """The layer is left out: what would flow into it flows out of it.

    layer: as stops count (the layer after which a stop at this number comes), or its path.
    """

    layer: int | str


Edit = Add | Set | Scale | Zero | Project | Lerp | Patch | Skip


def selection(index: Index, shape: tuple[int, ...], what: str = "hidden") -> tuple[Any, ...]:
    """*index* as a tuple for numpy or torch, checked against *shape*.

    Never selects more than there is: a list is at most as long as its axis.
    Raises SelectionError: too many axes, out of range, two lists, a list too long, or nothing
    selected.
    """
    axes = _spread(index, len(shape), what, shape)
    chosen: list[Any] = []
    lists = 0
    for axis, (part, extent) in enumerate(zip(axes, shape, strict=True)):
        if isinstance(part, Pick):
            _in_range(part.at, extent, axis, what, shape)
            chosen.append(part.at)
        elif isinstance(part, Take):
            lists += 1
            if len(part.at) > extent:  # else a few KiB of index could ask for any amount of memory
                raise SelectionError(
                    f"a list of {len(part.at)} positions on axis {axis} of {what} with shape "
                    f"{shape}: at most {extent}"
                )
            for item in part.at:
                _in_range(item, extent, axis, what, shape)
            # Negative steps and lists alike become lists of positions: torch knows no others.
            chosen.append([item % extent for item in part.at])
        else:
            step = 1 if part.step is None else part.step
            if step == 0:
                raise SelectionError(f"a slice with step 0 on axis {axis} of {what}")
            places = range(*slice(part.start, part.stop, part.step).indices(extent))
            if step > 0:
                # torch overflows on steps that numpy clips.
                step = min(step, max(extent, 1))
                chosen.append(slice(places.start, max(places.start, places.stop), step))
            else:
                lists += 1
                chosen.append(list(places))
            if not places:
                raise SelectionError(
                    f"the slice on axis {axis} selects nothing of {what} with shape {shape}"
                )
        if isinstance(chosen[-1], list) and not chosen[-1]:
            raise SelectionError(f"an empty list on axis {axis} selects nothing of {what}")
    if lists > 1:
        raise SelectionError(f"an index of {what} may hold one list or reversed slice, got {lists}")
    parts = list(chosen)
    if len(index) > len(shape):  # `...` for no axis: to numpy it is a slice all the same
        parts.insert(next(p for p, part in enumerate(index) if isinstance(part, Rest)), slice(None))
    if lists and _parted(parts):
        raise SelectionError(
            f"an int and a list with a slice or '...' between them in an index of {what}: numpy and "
            "torch order the result differently; write the int i as i:i+1"
        )
    return tuple(chosen)


def _parted(chosen: list[Any]) -> bool:
    """Does a slice stand between a list and an int?"""
    places = [place for place, part in enumerate(chosen) if not isinstance(part, slice)]
    return places != list(range(places[0], places[-1] + 1))


def _spread(index: Index, rank: int, what: str, shape: tuple[int, ...]) -> list[Any]:
    """Fill `...` and missing trailing axes with full slices."""
    rests = [place for place, part in enumerate(index) if isinstance(part, Rest)]
    if len(rests) > 1:
        raise SelectionError("an index may hold '...' once")
    named = len(index) - len(rests)
    if named > rank:
        raise SelectionError(f"{named} axes indexed, {what} has {rank}: shape {shape}")
    whole = [Stretch(None, None, None)] * (rank - named)
    place = rests[0] if rests else len(index)
    return [*index[:place], *whole, *index[place + len(rests) :]]


def _in_range(at: int, extent: int, axis: int, what: str, shape: tuple[int, ...]) -> None:
    if not -extent <= at < extent:
        raise SelectionError(
            f"index {at} is out of range on axis {axis} of {what} with shape {shape}: "
            f"allowed {-extent} to {extent - 1}"
        )


def tensors_in(edits: tuple[Edit, ...]) -> Iterator[Tensor]:
    for edit in edits:
        if isinstance(edit, (Add, Set, Lerp)):
            yield edit.value
        elif isinstance(edit, Project):
            yield edit.direction
