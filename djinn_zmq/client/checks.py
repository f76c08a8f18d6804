"""What a caller may give, looked at before anything travels. Each raises an error of *kind* that says what
was given under which name, and what is allowed there.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.errors import RequestError
from djinn_zmq.wire.tensors import DTYPES

Kind = type[RequestError]

WHOLE = (int, np.integer)
LARGEST = 2**63 - 1  # that travels, the sign apart
SHOWN = 80  # characters of what was given


def shown(value: Any) -> str:
    """*value* as it was given, in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def is_whole(value: Any) -> bool:
    return isinstance(value, WHOLE) and not isinstance(value, bool)


def whole(
    what: str,
    value: Any,
    *,
    least: int = -LARGEST,
    most: int = LARGEST,
    allowed: str = "",
    kind: Kind = RequestError,
) -> int:
    """*value* as an int between *least* and *most*. allowed: in place of the words for these."""
    if is_whole(value) and least <= value <= most:
        return int(value)
    if not allowed:
        allowed = "a whole number"
        if most < LARGEST:
            allowed += f" from {least} to {most}"
        elif least > -LARGEST:
            allowed += f", {least} or more"
    raise kind(f"{what}={shown(value)}: {allowed}")


def number(what: str, value: Any, *, kind: Kind = RequestError) -> float:
    """*value*, or the only element of an array or tensor, as a finite float."""
    try:
        if not isinstance(value, (str, bytes, bool)):
            found = float(value)
            if np.isfinite(found):
                return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise kind(f"{what}={shown(value)}: a finite number")


def seconds(what: str, value: Any, allowed: str = "a positive number of seconds") -> float:
    """*value* as a float greater than 0; infinity is one."""
    try:
        if isinstance(value, (float, *WHOLE, np.floating)) and not isinstance(value, bool):
            found = float(value)
            if found > 0:
                return found
    except (TypeError, OverflowError):
        pass
    raise RequestError(f"{what}={shown(value)}: {allowed}")


def flag(what: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise RequestError(f"{what}={shown(value)}: True or False")


def text(what: str, value: Any) -> str:
    if isinstance(value, str):
        return str(value)  # numpy's own kind of it is none that travels
    raise RequestError(f"{what}={shown(value)}: text")


def one_of(what: str, value: Any, allowed: Iterable[str]) -> str:
    words = list(allowed)
    if isinstance(value, str) and value in words:
        return str(value)
    *some, last = [f'"{word}"' for word in words]
    raise RequestError(f"{what}={shown(value)}: {', '.join(some)} or {last}")


def path(what: str, value: Any) -> Path:
    """A path with a file's name in it: text, or what pathlib makes."""
    if isinstance(value, (str, os.PathLike)):
        found = os.fspath(value)
        if isinstance(found, str) and "\0" not in found and Path(found).name:
            return Path(found)
    raise RequestError(f"{what}={shown(value)}: the path of a file")


def model(what: str, value: Any) -> str:
    """What a model is asked for by."""
    if isinstance(value, (str, os.PathLike)):
        found = os.fspath(value)
        if isinstance(found, str):
            return str(found)
    raise RequestError(f"{what}={shown(value)}: a served name, a directory, or a hub id")


def several(
    what: str,
    value: Any,
    allowed: str,
    *,
    alone: tuple[type, ...] = (),
    kind: Kind = RequestError,
) -> list[Any]:
    """The elements of a list, a tuple, an array, or of anything else that can be gone through, other than
    text. alone: the types of what may stand without a list."""
    if isinstance(value, alone):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        try:
            return list(value)
        except TypeError:  # an array without axes
            pass
    raise kind(f"{what}={shown(value)}: {allowed}")


def array(what: str, value: Any, *, kind: Kind = RequestError) -> np.ndarray:
    """*value* as numpy takes it; a torch tensor of bfloat16 in host memory, too."""
    if is_masked(value):
        raise kind(f"{what}: a masked array, whose masked values would be taken: give .filled(…)")
    try:
        return np.asarray(value)
    except (ValueError, OverflowError) as exc:
        raise kind(f"{what}={shown(value)}: an array, or lists of one length") from exc
    except (TypeError, RuntimeError) as exc:  # a torch tensor on a GPU, or with a gradient
        found = of_bfloat16(value)
        if found is None:
            name = type(value).__name__
            raise kind(f"{what}: numpy makes no array of this {name}: {exc}") from exc
        return found


def is_masked(value: Any) -> bool:
    """Is it one of numpy.ma's, of which `np.asarray` shows what is masked?"""
    return (
        type(value) is not np.ndarray and isinstance(value, np.ndarray) and hasattr(value, "filled")
    )


def of_bfloat16(value: Any) -> np.ndarray | None:
    """A torch tensor of bfloat16 as an array over its memory; None for anything else, and for one with a
    gradient where those are recorded, as torch itself refuses it. torch makes none, because numpy has the type from
    ml_dtypes alone. Whoever has a tensor has imported torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
        return None
    if value.device.type != "cpu" or (value.requires_grad and torch.is_grad_enabled()):
        return None
    found: np.ndarray = (
        value.detach().contiguous().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    )
    return found
