"""The edits a resume can make. Each says what, with which values, and `at` which part of hidden.

`at` is numpy's own index notation over (batch, position, channel), e.g. `at=(0, -1)` for the last
position of the first prompt; by default all of hidden. Values are checked here, before anything
travels: float16, bfloat16, float32, float64 or whole numbers, finite, and of a shape that numpy
would broadcast to the part chosen. What the activations' dtype cannot hold is found when the edit is
about to be made. Edits are made in the order given, on the engine, in float32 and rounded once; only
their own values travel.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.calls import Operation
from djinn_zmq.client.indexing import index_of, shown_index
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.errors import EditError, RequestError
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire.tensors import Tensor, dtype_name

# The largest finite number of each dtype that has one below Python's own.
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}


class Edit(Protocol):
    """What every edit offers to the client's own code."""

    @property
    def array(self) -> np.ndarray | None:
        """The values that must travel, if any."""

    def _check(self, dtype: str) -> None:
        """Raises EditError for a number that would be infinite where *dtype* flows."""

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        """The edit as data, with *tensor* saying where `array` went."""


class Kept(Protocol):
    """What a Patch takes from: a checkpoint."""

    id: int


class _Valued:
    """An edit with an array of values."""

    __slots__ = ("array", "at")

    def __init__(self, value: Any, at: Any = ...) -> None:
        self.array = _values(type(self).__name__, value)
        self.at = index_of(at)

    def _check(self, dtype: str) -> None:
        # Of a whole activation in its own dtype a look would take longer than all else (bfloat16: 0.1 s).
        if _most(str(self.array.dtype)) > _most(dtype):
            _held("a value", _largest(self.array), dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.array.dtype} {self.array.shape}{_at(self.at)})"


class Add(_Valued):
    """hidden[at] += value. Where the value is 0, no bit changes."""

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        assert tensor is not None
        return wire.Add(tensor, self.at)


class Set(_Valued):
    """hidden[at] = value, rounded to the checkpoint's dtype."""

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        assert tensor is not None
        return wire.Set(tensor, self.at)


class Lerp(_Valued):
    """hidden[at] += weight * (value - hidden[at])"""

    __slots__ = ("weight",)

    def __init__(self, value: Any, weight: float, at: Any = ...) -> None:
        super().__init__(value, at)
        self.weight = checks.number("Lerp: weight", weight, kind=EditError)

    def _check(self, dtype: str) -> None:
        super()._check(dtype)
        _held("a weight", self.weight, _wide(dtype))

    def __repr__(self) -> str:
        return f"Lerp({self.array.dtype} {self.array.shape}, {self.weight}{_at(self.at)})"

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        assert tensor is not None
        return wire.Lerp(tensor, self.weight, self.at)


class Project(_Valued):
    """Remove a direction: hidden[at] -= (hidden[at] · d) d, with d = direction / |direction|.

    direction: shape (n,), n the last extent of the part chosen (hidden_size, mostly).
    """

    def __init__(self, direction: Any, at: Any = ...) -> None:
        super().__init__(direction, at)

    def _check(self, dtype: str) -> None:
        """Only where it points matters, and that is found in float64."""

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        assert tensor is not None
        return wire.Project(tensor, self.at)


class _Plain:
    """An edit of which nothing travels beside it."""

    __slots__ = ()
    array = None

    def _check(self, dtype: str) -> None:
        """It brings no number."""


class Scale(_Plain):
    """hidden[at] *= factor"""

    __slots__ = ("at", "factor")

    def __init__(self, factor: float, at: Any = ...) -> None:
        self.factor = checks.number("Scale: factor", factor, kind=EditError)
        self.at = index_of(at)

    def _check(self, dtype: str) -> None:
        _held("a factor", self.factor, _wide(dtype))

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        return wire.Scale(self.factor, self.at)

    def __repr__(self) -> str:
        return f"Scale({self.factor}{_at(self.at)})"


class Zero(_Plain):
    """hidden[at] = 0"""

    __slots__ = ("at",)

    def __init__(self, at: Any = ...) -> None:
        self.at = index_of(at)

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        return wire.Zero(self.at)

    def __repr__(self) -> str:
        return f"Zero({_at(self.at).removeprefix(', ')})"


class Patch(_Plain):
    """hidden[at] = source.hidden[source_at], from another checkpoint; nothing travels.

    source_at: by default the same as *at*. Both parts must have the same shape.
    """

    __slots__ = ("at", "source", "source_at")

    def __init__(self, source: Kept, at: Any = ..., source_at: Any = None) -> None:
        if not hasattr(type(source), "hidden"):
            raise EditError(f"Patch: the source is {type(source).__name__}: give a checkpoint")
        self.source = source  # held, so that it is not released while the edit may be made
        self.at = index_of(at)
        self.source_at = self.at if source_at is None else index_of(source_at)

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        return wire.Patch(self.source.id, self.at, self.source_at)

    def __repr__(self) -> str:
        whence = _at(self.source_at, "source_at") if self.source_at != self.at else ""
        return f"Patch({self.source!r}{_at(self.at)}{whence})"


class Skip(_Plain):
    """Leave a layer out: what would flow into it flows out of it, for this run alone.

    layer: as stops count, so `Skip(3)` is the layer between stop 2 and stop 3; or its path,
    "layers.2".
    """

    __slots__ = ("layer",)

    def __init__(self, layer: int | str) -> None:
        if not isinstance(layer, str):
            layer = checks.whole("Skip: layer", layer, allowed="a number or a path", kind=EditError)
        self.layer = str(layer) if isinstance(layer, str) else layer

    def _on_wire(self, tensor: Tensor | None) -> wire.Edit:
        return wire.Skip(self.layer)

    def __repr__(self) -> str:
        return f"Skip({self.layer!r})"


def placed_edits(
    edits: Sequence[Edit] | Edit, parcel: Parcel, dtype: str
) -> Operation[tuple[wire.Edit, ...]]:
    """*edits* as data, their values on the way with *parcel*. dtype: of what they change.

    Raises RequestError for what is no edit, EditError for numbers that are too large for *dtype*.
    """
    on_wire = []
    for place, edit in enumerate(each_of(edits)):
        if isinstance(edit, type) or not hasattr(edit, "_on_wire") or not hasattr(edit, "array"):
            raise RequestError(f"{checks.shown(edit)} is no edit: use djinn_zmq.Add, Set, Patch …")
        try:
            edit._check(dtype)
        except EditError as exc:
            raise EditError(f"edit {place} ({type(edit).__name__}): {exc}") from exc
        tensor = None
        if edit.array is not None:
            tensor = yield from parcel.place(edit.array)
        on_wire.append(edit._on_wire(tensor))
    return tuple(on_wire)


def each_of(edits: Sequence[Edit] | Iterable[Edit] | Edit) -> Iterable[Edit]:
    """The edits that were given: of a generator those that it still has, of what is no list an edit alone."""
    if isinstance(edits, (list, tuple)):
        return edits
    # An array can be gone through as well, and text: these are shown whole where they are refused.
    if isinstance(edits, (str, bytes, dict, type)) or hasattr(edits, "__array__"):
        return [edits]  # type: ignore[list-item]
    return edits if isinstance(edits, Iterable) else [edits]


def _at(index: wire.Index, name: str = "at") -> str:
    """As an edit shows it, nothing where it is all of hidden."""
    return "" if index == index_of(...) else f", {name}={shown_index(index)}"


def own(edit: Edit) -> Edit:
    """*edit* with values of its own: it may be made again when those that it was given have changed."""
    if edit.array is None:
        return edit
    twin: Any = copy.copy(edit)
    twin.array = edit.array.copy()
    return twin  # type: ignore[no-any-return]


def _wide(dtype: str) -> str:
    """In which the engine calculates."""
    return "float64" if dtype == "float64" else "float32"


def _most(dtype: str) -> float:
    return LARGEST.get(dtype, float("inf"))


def _held(what: str, number: float, dtype: str) -> None:
    most = _most(dtype)
    if abs(number) > most:
        raise EditError(f"{what} of {number:g}: {dtype} holds {-most:g} to {most:g}")


def _largest(array: np.ndarray) -> float:
    """Its number that is farthest from 0."""
    ends = (float(array.max(initial=0)), float(array.min(initial=0)))
    return max(ends, key=abs)


def _values(name: str, value: Any) -> np.ndarray:
    """*value* as a C-contiguous array of a float dtype. Raises EditError."""
    if hasattr(value, "hidden") and hasattr(value, "resume"):
        raise EditError(f"{name}: values are numbers, not {value!r}: give its .hidden, or a Patch")
    array = checks.array(f"{name}: value", value, kind=EditError)
    if array.dtype.kind in "iu":
        array = array.astype(np.float32)
    named = dtype_name(array.dtype)
    if named is None or array.dtype.kind == "b":
        raise EditError(
            f"{name}: values of dtype {array.dtype}; allowed are float16, bfloat16, float32, "
            "float64 and whole numbers"
        )
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(np.argwhere(~finite)[0].tolist())
        raise EditError(f"{name}: the value at {list(place)} is {array[place]}: must be finite")
    return np.ascontiguousarray(array).reshape(array.shape)
