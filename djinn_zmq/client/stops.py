"""Stops: where a run stops, on which condition, and what it keeps on the way.

A place is a number (so many layers executed), or a module's path. `"layers.12.mlp"` is that module's
output (modules count from 0, as the model's own names do), `"layers.12.mlp.input"` its input,
`"layers.12.self_attn.heads"` what each attention head gives, (batch, positions, heads, head_dim);
`"embedding"`, `"norm"` and `"head"` are before and behind the layers in every model. With a leading
dot, `".mlp"`, it is that module of every layer: a run stops at the first it comes to.
"""

from typing import Any

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.errors import LayerError, StopError
from djinn_zmq.settings import counted
from djinn_zmq.wire import stops as wire
from djinn_zmq.wire.messages import Wanted

Logits = str | int
Place = int | str

PLACE = "a layer is a whole number, a place in one a module's path"


class Condition:
    """What must hold for a `Break` to stop. Combine with `|` and `&`."""

    _on_wire: wire.Condition

    def __or__(self, other: "Condition") -> "Condition":
        return _Joined("|", self, other)

    def __and__(self, other: "Condition") -> "Condition":
        return _Joined("&", self, other)

    def __bool__(self) -> bool:
        raise StopError("a condition is evaluated on the engine: combine with | and &")


class _Joined(Condition):
    """As any of several ways to hold, each of tests that must hold together."""

    def __init__(self, sign: str, one: Condition, other: Condition) -> None:
        if not isinstance(other, Condition):
            raise StopError(f"{other!r} is no condition: use HasNaN, Norm, Token, Step")
        if sign == "|":
            self._on_wire = one._on_wire + other._on_wire
        else:
            self._on_wire = tuple(here + there for here in one._on_wire for there in other._on_wire)
        count = sum(map(len, self._on_wire))
        if count > wire.TESTS_LIMIT:
            raise StopError(f"a condition of {counted(count, 'test')}: at most {wire.TESTS_LIMIT}")
        self._shown = f"({one!r} {sign} {other!r})"

    def __repr__(self) -> str:
        return self._shown


class HasNaN(Condition):
    """Some number at the stop is NaN."""

    _on_wire = ((wire.HasNaN(),),)

    def __repr__(self) -> str:
        return "HasNaN()"


class Norm(Condition):
    """The L2 norm of the value at some position is `op` (">", ">=", "<", "<=") *value*."""

    def __init__(self, op: str, value: float) -> None:
        try:
            if not isinstance(op, str) or isinstance(value, (str, bytes, bool, np.bool_)):
                raise TypeError
            self._test = wire.Norm(str(op), float(value))
            if self._test.value != self._test.value:  # NaN: nothing compares with it
                raise ValueError
        except (TypeError, ValueError, OverflowError) as exc:
            given = f"{checks.shown(op)}, {checks.shown(value)}"
            raise StopError(f'Norm({given}): text, such as ">", and a number') from exc
        self._on_wire = ((self._test,),)

    def __repr__(self) -> str:
        return f'Norm("{self._test.op}", {self._test.value:g})'


class Token(Condition):
    """The tokens this forward pass works on hold this one: the prompt's, or while generating the
    newest. Text (with a blank before it or without), or an id."""

    def __init__(self, token: str | int) -> None:
        if isinstance(token, np.integer):
            token = int(token)
        if not isinstance(token, (str, int)) or isinstance(token, bool):
            raise StopError(f"Token({checks.shown(token)}): text, or an id")
        self._token = str(token) if isinstance(token, str) else token
        self._on_wire = ((wire.Token(self._token),),)

    def __repr__(self) -> str:
        return f"Token({self._token!r})"


class Step(Condition):
    """This forward pass is number *number* of a generation. A plain run is step 0."""

    def __init__(self, number: int) -> None:
        self._number = checks.whole("Step", number, least=0, kind=StopError)
        self._on_wire = ((wire.Step(self._number),),)

    def __repr__(self) -> str:
        return f"Step({self._number})"


class Break:
    """A stop at a place, where a condition holds there. Without a place: after whichever layer it
    holds first. Without a condition: in any case."""

    def __init__(self, at: Place | None = None, when: Condition | None = None) -> None:
        if when is not None and not isinstance(when, Condition):
            raise StopError(f"when={when!r}: use HasNaN, Norm, Token, Step, joined by | and &")
        if at is None and when is None:
            raise StopError("a Break needs a place, a condition, or both")
        self.at: Place = "" if at is None else _place("at", at)
        self.when = when

    @property
    def _on_wire(self) -> wire.Break:
        return wire.Break(self.at, () if self.when is None else self.when._on_wire)

    def __repr__(self) -> str:
        parts = [repr(self.at)] if self.at != "" else []
        parts += [f"when={self.when!r}"] if self.when is not None else []
        return f"Break({', '.join(parts)})"


def wanted_of(
    stop_at: Any, save_at: Any, logits: Logits, layer: int, depth: int, place: str = ""
) -> Wanted:
    """The caller's words as data; layer, place, depth: where the run starts, how far the model goes.

    Raises RequestError for what is none.
    """
    number, breaks = _stop_of(stop_at)
    numbers: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    if not isinstance(save_at, tuple) or save_at:
        last = depth if number is None else min(number, depth)  # one behind it is refused by name
        if (breaks or place) and isinstance(save_at, str) and save_at == wire.ALL:
            paths = (wire.ALL,)  # which these are is for the engine to say
        else:
            numbers, paths = _saves_of(save_at, layer, last)
    stop: int | wire.Stops | None = number
    if paths or breaks:
        if number is not None:
            breaks = (wire.Break(number, ()),)
        stop = wire.Stops(breaks, paths)
    if isinstance(logits, str) and logits in ("last", "all", "none"):
        return Wanted(stop, numbers, str(logits), 0)
    allowed = '"last", "all", "none", or how many of the likeliest, 1 or more'
    return Wanted(stop, numbers, "top", checks.whole("logits", logits, least=1, allowed=allowed))


def breaks_of(stop_at: Any) -> tuple[wire.Break, ...]:
    """Breakpoints, in the words of `stop_at`, as data; None, or none of them: (). Raises as
    `wanted_of`."""
    if stop_at is None or (isinstance(stop_at, (list, tuple)) and not stop_at):
        return ()
    number, breaks = _stop_of(stop_at)
    return breaks if number is None else (wire.Break(number, ()),)


def _saves_of(save_at: Any, first: int, last: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers and paths, each once."""
    if isinstance(save_at, str) and save_at == wire.ALL:
        save_at = range(first, last + 1)
    if save_at is None:
        return (), ()
    alone = (*checks.WHOLE, str)
    saves = checks.several("save_at", save_at, PLACE, alone=alone, kind=LayerError)
    places = [_place("save_at", one) for one in saves]
    numbers = tuple(sorted({one for one in places if isinstance(one, int)}))
    return numbers, tuple(dict.fromkeys(one for one in places if isinstance(one, str)))


def _stop_of(stop_at: Any) -> tuple[int | None, tuple[wire.Break, ...]]:
    """A number alone, or all that is more than one."""
    if stop_at is None or type(stop_at) is int:
        return stop_at, ()
    if isinstance(stop_at, Break):
        return None, (stop_at._on_wire,)
    if isinstance(stop_at, (list, tuple)):
        if not stop_at:
            raise LayerError("stop_at=[]: at least one place; None: run to the end")
        return None, tuple(_break_of(one)._on_wire for one in stop_at)
    place = _place("stop_at", stop_at)
    return (place, ()) if isinstance(place, int) else (None, (wire.Break(place, ()),))


def _break_of(one: Any) -> Break:
    return one if isinstance(one, Break) else Break(_place("stop_at", one))


def _place(what: str, value: Any) -> Place:
    if isinstance(value, str) and value.strip():
        return str(value).strip()
    return checks.whole(what, value, allowed=PLACE, kind=LayerError)
