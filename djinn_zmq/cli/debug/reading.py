"""What is typed, as what is meant: places, conditions, indices, values, edits.

PLACE   2 · layers.1.mlp · .mlp · norm
COND    nan · norm > 50 · token is · step 3, joined by `and`, `or`
AT      [0, -1] · [:, 2:5] · [..., 7]
VALUE   0.5 · 1,0,-1 · vector.npy
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from djinn_zmq.client.edits import Add, Lerp, Patch, Project, Scale, Set, Skip, Zero
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.stops import Break, Condition, HasNaN, Norm, Step, Token
from djinn_zmq.errors import RequestError

COMPARED = re.compile(r"norm\s*(>=|<=|>|<)\s*(\S+)")
POINT = re.compile(r"#(\d+)")
EDITS = (
    "zero, scale FACTOR, add VALUE, set VALUE, lerp VALUE WEIGHT, project VECTOR, patch #N, skip N"
)

# What numpy raises of what is no file of its own, is empty, or says that it is larger than memory; and
# pathlib of a user that there is not.
NO_ARRAY = (OSError, ValueError, EOFError, BadZipFile, MemoryError, RuntimeError)

Points = Callable[[int], Checkpoint]  # the checkpoint of a number that has been shown


class Mistyped(RequestError):
    """What was typed means nothing; the sentence says what would."""

    code = "mistyped"


def whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as exc:
        raise Mistyped(f"{text!r} is no {what}: a whole number") from exc


def number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise Mistyped(f"{text!r} is no {what}: a number") from exc


def place(text: str) -> int | str:
    return whole(text, "layer") if re.fullmatch(r"-?\d+", text) else text


def stop(text: str) -> Any:
    """What a breakpoint is set at: `PLACE`, `PLACE if COND`, `if COND`."""
    head, found, tail = (
        re.split(r"(^if\s+|\s+if\s+|\sif$|^if$)", text, maxsplit=1)
        if (re.search(r"(^|\s)if(\s|$)", text))
        else (text, "", "")
    )
    head = head.strip()
    if len(head.split()) > 1:
        raise Mistyped(f"{head!r} is no place: a number of layers, or a module's path")
    if not found:
        return place(head)
    return Break(place(head) if head else None, when=condition(tail))


def condition(text: str) -> Condition:
    """Raises Mistyped, StopError."""
    if not text.strip():
        raise Mistyped("a condition is missing: nan, norm > 50, token WORD, step N")
    found: Condition | None = None
    for way in re.split(r"\s+or\s+", text.strip()):
        tests = [_test(one.strip()) for one in re.split(r"\s+and\s+", way)]
        joined = tests[0]
        for one in tests[1:]:
            joined = joined & one
        found = joined if found is None else found | joined
    assert found is not None
    return found


def _test(text: str) -> Condition:
    head, _, rest = text.partition(" ")
    compared = COMPARED.fullmatch(text)
    if text == "nan":
        return HasNaN()
    if compared:
        return Norm(compared[1], number(compared[2], "norm"))
    if head == "token" and rest.strip():
        word = rest.strip().strip("\"'")
        return Token(whole(word, "token") if word.isdecimal() else word)
    if head == "step" and rest.strip():
        return Step(whole(rest.strip(), "step"))
    raise Mistyped(f"{text!r} is no condition: nan, norm > 50, token WORD, step N")


def split_index(text: str) -> tuple[str, str]:
    """What stands before the index that ends *text*, and the index; "" where there is none."""
    found = re.fullmatch(r"(.*?)(\[[^\[\]]*\])\s*", text)
    return (found[1].strip(), found[2]) if found else (text.strip(), "")


def index(text: str) -> Any:
    """`[0, -1]` as numpy takes it; "": all."""
    if not text:
        return ...
    parts = text.strip()[1:-1].split(",")
    if parts == [""]:
        raise Mistyped("an empty index: [0, -1] is the last position of the first prompt")
    return tuple(_part(part.strip()) for part in parts)


def _part(text: str) -> Any:
    if text == "...":
        return ...
    bounds = text.split(":")
    if len(bounds) > 3 or not all(re.fullmatch(r"\s*(-?\d+)?\s*", bound) for bound in bounds):
        raise Mistyped(f"{text!r} in an index: a number, a range like 2:5, or ...")
    if len(bounds) == 1:
        if not text:
            raise Mistyped("an index with a place left empty: use : for all of it")
        return whole(text, "index")
    return slice(*(whole(bound, "index") if bound.strip() else None for bound in bounds))


def value(text: str) -> Any:
    """A number, numbers with commas between, or the numpy file that holds them."""
    if text.endswith(".npy"):
        try:
            return np.load(Path(text).expanduser(), allow_pickle=False)
        except NO_ARRAY as exc:
            raise Mistyped(f"{text} cannot be read as an array: {exc}") from exc
    numbers = [number(part, "value") for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else np.array(numbers, np.float32)


def edit(text: str, points: Points) -> Any:
    """`scale 0 [0, -1]`, `patch #3 [0, 3]`, … Raises Mistyped, EditError."""
    head, at_text = split_index(text)
    source_at = None
    if head.endswith("]"):  # patch #3 [0, 3] [0, 4]: from there to here
        head, from_text = split_index(head)
        source_at = index(from_text)
    kind, *words = head.split()
    at = index(at_text)
    makers: dict[str, tuple[int, Callable[..., Any]]] = {
        "zero": (0, lambda: Zero(at=at)),
        "scale": (1, lambda factor: Scale(number(factor, "factor"), at=at)),
        "add": (1, lambda given: Add(value(given), at=at)),
        "set": (1, lambda given: Set(value(given), at=at)),
        "lerp": (2, lambda given, weight: Lerp(value(given), number(weight, "weight"), at=at)),
        "project": (1, lambda given: Project(value(given), at=at)),
        "patch": (1, lambda given: Patch(point(given, points), at=at, source_at=source_at)),
        "skip": (1, lambda layer: Skip(place(layer))),
    }
    if kind not in makers:
        raise Mistyped(f"{kind!r} is no edit: {EDITS}")
    count, make = makers[kind]
    if len(words) != count:
        raise Mistyped(
            f"{kind} takes {count} of its own, got {len(words)}: {EDITS}; an index stands in brackets, as [0, -1]"
        )
    if kind == "skip" and at_text or source_at is not None and kind != "patch":
        raise Mistyped(f"{text!r}: one index at most, and none for skip")
    return make(*words)


def point(text: str, points: Points) -> Checkpoint:
    found = POINT.fullmatch(text)
    if not found:
        raise Mistyped(f"{text!r} is no checkpoint: #N, as 'info checkpoints' numbers them")
    return points(whole(found[1], "checkpoint"))
