"""numpy's index notation as wire data."""

from typing import Any

import numpy as np

from djinn_zmq.client.checks import array, is_whole, shown
from djinn_zmq.errors import SelectionError
from djinn_zmq.wire.edits import Index, Pick, Rest, Stretch, Take


def index_of(at: Any) -> Index:
    """Ints, slices, `...`, lists of ints, and tuples of those.

    Raises SelectionError for anything else (boolean masks, None, floats).
    """
    parts = at if isinstance(at, tuple) else (at,)
    return tuple(_part(part) for part in parts)


def shown_index(index: Index) -> str:
    """In numpy's notation: "(0, -1, 2:5)"."""
    parts = [_shown_part(part) for part in index]
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def _shown_part(part: Pick | Stretch | Take | Rest) -> str:
    if isinstance(part, Rest):
        return "..."
    if isinstance(part, Stretch):
        start, stop, step = (
            "" if one is None else str(one) for one in (part.start, part.stop, part.step)
        )
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
    return str(part.at if isinstance(part, Pick) else list(part.at))


def _part(part: Any) -> Pick | Stretch | Take | Rest:
    if part is Ellipsis:
        return Rest()
    if isinstance(part, slice):
        return Stretch(*(_bound(bound) for bound in (part.start, part.stop, part.step)))
    if is_whole(part):
        return Pick(int(part))
    if isinstance(part, (list, range, np.ndarray)):
        found = array("index", part, kind=SelectionError)
        if found.ndim == 1 and found.dtype.kind in "iu":
            return Take(tuple(int(item) for item in found))
    raise SelectionError(
        f"{shown(part)} in an index: use ints, slices, '...' or lists of ints, one for each axis"
    )


def _bound(bound: Any) -> int | None:
    if bound is None:
        return None
    if is_whole(bound):
        return int(bound)
    raise SelectionError(f"{shown(bound)} in a slice: use ints")
