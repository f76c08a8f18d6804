"""numpy's index notation as wire data."""

from typing import Any

import numpy as np

from djinn_zmq.errors import SelectionError
from djinn_zmq.wire.edits import Index, Pick, Rest, Stretch, Take


def index_of(at: Any) -> Index:
    """Ints, slices, `...`, lists of ints, and tuples of those.

    Raises SelectionError for anything else (boolean masks, None, floats).
    """
    parts = at if isinstance(at, tuple) else (at,)
    return tuple(_part(part) for part in parts)


def _part(part: Any) -> Pick | Stretch | Take | Rest:
    if part is Ellipsis:
        return Rest()
    if isinstance(part, slice):
        return Stretch(*(_bound(bound) for bound in (part.start, part.stop, part.step)))
    if _is_int(part):
        return Pick(int(part))
    if isinstance(part, (list, range, np.ndarray)):
        array = np.asarray(part)
        if array.ndim == 1 and array.dtype.kind in "iu":
            return Take(tuple(int(item) for item in array))
    raise SelectionError(
        f"{part!r} in an index: use ints, slices, '...' or lists of ints, one for each axis"
    )


def _bound(bound: Any) -> int | None:
    if bound is None:
        return None
    if _is_int(bound):
        return int(bound)
    raise SelectionError(f"{bound!r} in a slice: use ints")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
