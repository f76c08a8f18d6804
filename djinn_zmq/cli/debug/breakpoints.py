"""Breakpoints: break, watch, delete; and what of them concerns a run that goes on from here."""

from typing import Any

from djinn_zmq.cli.debug import drawing, reading
from djinn_zmq.cli.debug.debugger import Breakpoint, Debugger, word
from djinn_zmq.cli.debug.reading import Mistyped
from djinn_zmq.client.stops import Break, Condition

BEHIND = 10**6  # of the norm and the head: more layers than there are


@word("break", "b", usage="[PLACE] [if CONDITION]")
def break_(debugger: Debugger, rest: str) -> None:
    """Stop there: after so many layers (0: the embedding), or at a module: layers.1.mlp, .mlp, norm.

    Conditions: nan · norm > 50 · token WORD · step N, joined by and, or. Without a place: wherever
    it holds. Without anything: list the breakpoints.
    """
    if not rest:
        show_breaks(debugger)
        return
    _add(debugger, rest, reading.stop(rest))


@word("watch", usage="CONDITION")
def watch(debugger: Debugger, rest: str) -> None:
    """Stop after whichever layer a condition holds first: watch norm > 50, watch nan."""
    when: Condition = reading.condition(rest)
    _add(debugger, f"if {rest}", Break(when=when))


@word("delete", "d", usage="[NUMBER]")
def delete(debugger: Debugger, rest: str) -> None:
    """Delete a breakpoint, or all."""
    if rest:
        number = reading.whole(rest, "breakpoint")
        if number not in debugger.breaks:
            raise Mistyped(f"there is no breakpoint {number}: 'break' lists them")
        del debugger.breaks[number]
    else:
        debugger.breaks.clear()
    _tell_breaks(debugger)


# ---- what they share


def show_breaks(debugger: Debugger) -> None:
    if not debugger.breaks:
        debugger.say("no breakpoints")
        return
    rows = [(number, one.text) for number, one in debugger.breaks.items()]
    debugger.say(drawing.table(("", "stops at"), rows, right=(0,)))


def _add(debugger: Debugger, text: str, stop: Any) -> None:
    number = max(debugger.breaks, default=0) + 1
    debugger.breaks[number] = Breakpoint(text, stop)
    try:
        _check(debugger, stop)
        _tell_breaks(debugger)
    except BaseException:
        del debugger.breaks[number]
        raise
    debugger.say(drawing.Text(f"breakpoint {number}: {text}"))


def _check(debugger: Debugger, stop: Any) -> None:
    """Raises LayerError for a layer the model does not have; paths are for the engine to know."""
    if isinstance(stop, int) and debugger.model is not None:
        last = debugger.model.num_layers
        if not 0 <= stop <= last:
            raise Mistyped(f"layer {stop} does not exist: {debugger.model.name} has 0-{last}")


def _tell_breaks(debugger: Debugger) -> None:
    if debugger.attached is not None:
        debugger.attached.breaks(debugger.stops())


def ahead_of(debugger: Debugger) -> list[Any] | None:
    """The breakpoints for a resume: a number alone may not lie behind it, several may."""
    stops = debugger.stops()
    point = debugger.here()
    ahead = [one for one in stops if not isinstance(one, int) or one > point.layer]
    # Of several, those that lie behind are passed over; one by itself would be refused.
    return ahead * 2 if len(ahead) == 1 else ahead or None


def saved_before(debugger: Debugger, layer: int) -> list[int]:
    """The layers to save on the way from *layer* (-1: from the tokens), so that one can step back:
    those before the first certain stop."""
    certain = [debugger.the_model().num_layers]
    for stop in debugger.stops():
        at, when = (stop.at, stop.when) if isinstance(stop, Break) else (stop, None)
        reached = at if isinstance(at, int) else _reached(at, layer)
        if when is None and reached >= layer:
            certain.append(reached)
    return list(range(layer + 1, min(certain) + 1))


def _reached(path: str, layer: int) -> int:
    """How many layers have run when a module is reached, as far as its path says; at the least."""
    first, *parts = path.split(".")
    if not first:
        return max(layer, 0)
    if first in ("norm", "head"):
        return BEHIND
    if first == "layers" and parts and parts[0].isdecimal():
        return int(parts[0]) + (len(parts) == 1)
    return -1 if first == "embedding" else layer
