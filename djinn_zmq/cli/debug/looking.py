"""Words that show: where, print, lens, info, help."""

from collections.abc import Callable
from typing import Any

import numpy as np

from djinn_zmq.cli import naming
from djinn_zmq.cli.debug import drawing, reading
from djinn_zmq.cli.debug.breakpoints import show_breaks
from djinn_zmq.cli.debug.debugger import WORDS, Debugger, find, word
from djinn_zmq.cli.debug.moving import checkpoint_of, show_place
from djinn_zmq.cli.debug.reading import Mistyped
from djinn_zmq.client.looks import Lens
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.settings import counted, format_bytes

TOP = 5
EVENTS = 12


@word("where", "w", "bt", usage="")
def where(debugger: Debugger, rest: str) -> None:
    """Where it stands: the model, the tokens, and the checkpoints on the way here."""
    point = debugger.here()
    model = debugger.the_model()
    whose = "" if debugger.attached is None else f", session {debugger.attached.target.id:016x}"
    debugger.say(
        drawing.Text(
            f"{model.name}: {counted(model.num_layers, 'layer')}, {model.dtype} on {model.device}{whose}"
        )
    )
    tokens = drawing.Text()
    before = () if debugger.stop is None else debugger.stop.before
    for place, piece in enumerate(debugger.pieces(point, [*before, *point.ids[0]])):
        own = place >= len(before)
        tokens.append(f"{place - len(before)}:" if own else "", style="dim")
        tokens.append(f"{piece} ", style="bold" if own else "dim")
    debugger.say(tokens)
    if len(point.ids) > 1:
        debugger.say(f"… and {len(point.ids) - 1} more prompts of its batch")
    for known in point.history[:-1]:
        at = f"at {known.place}" if known.place else f"after layer {known.layer}"
        debugger.say(drawing.Text(f"  #{debugger.number(known)} {at}", style="dim"))
    show_place(debugger)
    if debugger.edits:
        names = "; ".join(text for text, _ in debugger.edits)
        debugger.say(drawing.Text(f"pending: {names}", style="yellow"))


@word("print", "p", usage="[WHAT] [#N] [AT]")
def print_(debugger: Debugger, rest: str) -> None:
    """Show what flows here, or at checkpoint #N: its norms by token; or, with an index, the numbers.

    print · print [0, -1] · print top [K] · print diff #N · print attention [LAYER] · print spans
    """
    head, at = reading.split_index(rest)
    words = head.split()
    point = debugger.point
    for text in [one for one in words if one.startswith("#")]:
        if words[0] != "diff":
            point = checkpoint_of(debugger, text)
            words.remove(text)
    what = words.pop(0) if words else "hidden"
    views: dict[str, Callable[[Debugger, Checkpoint, list[str]], None]] = {
        "top": _print_top,
        "norms": _print_norms,
        "diff": _print_diff,
        "attention": _print_attention,
    }
    if at and what != "hidden":
        raise Mistyped(f"print {what} takes no index, got {at}: 'print {at}' shows the numbers")
    if what == "spans":
        _no_more(words)
        _print_spans(debugger)
        return
    if point is None:
        point = debugger.here()
    if what == "hidden" and at:
        _no_more(words)
        part = np.asarray(point.hidden[reading.index(at)])
        debugger.say(drawing.Text(drawing.numbers(part, debugger.console.width)))
    elif what == "hidden":
        _print_norms(debugger, point, words)
    elif what in views:
        views[what](debugger, point, words)
    else:
        raise Mistyped(
            f"{what!r} cannot be printed: an index in brackets, as [0, -1], {', '.join(views)}, spans"
        )


def _print_norms(debugger: Debugger, point: Checkpoint, words: list[str]) -> None:
    _no_more(words)
    at = f"at {point.place}" if point.place else f"after layer {point.layer}"
    debugger.say(
        drawing.Text(
            f"#{debugger.number(point)} {at}: {point.dtype} {point.shape}, {format_bytes(point.nbytes)}"
        )
    )
    if len(point.shape) != 3:
        return
    norms = point.norms()[0]
    most = float(np.max(norms, where=np.isfinite(norms), initial=0.0)) or 1.0
    pieces = debugger.pieces(point, point.ids[0])
    rows = [
        (place, piece, f"{norm:.3f}", drawing.bar(max(norm / most, 1 / drawing.BAR), "blue"))
        for place, (piece, norm) in enumerate(zip(pieces, norms.tolist(), strict=True))
    ]
    debugger.say(drawing.table(("", "token", "norm", ""), rows, right=(0, 2)))


def _print_top(debugger: Debugger, point: Checkpoint, words: list[str]) -> None:
    count = reading.whole(words.pop(0), "number of tokens") if words else TOP
    _no_more(words)
    debugger.say(drawing.tops(point.top(count)))


def _print_diff(debugger: Debugger, point: Checkpoint, words: list[str]) -> None:
    if len(words) != 1:
        raise Mistyped("print diff #N: with which checkpoint?")
    debugger.say(drawing.Text(str(point.diff(checkpoint_of(debugger, words[0])))))


def _print_attention(debugger: Debugger, point: Checkpoint, words: list[str]) -> None:
    layer = reading.whole(words.pop(0), "layer") if words else None
    _no_more(words)
    weights = np.asarray(point.attention(layer), np.float32)[0].mean(0)  # of all heads
    # A layer with a window holds only the last of the past.
    keys = debugger.pieces(point, [*point.before, *point.ids[0]])[-weights.shape[1] :]
    rows = [
        (piece, [f"{share:.2f}" for share in row], row.tolist(), False)
        for piece, row in zip(keys[-len(weights) :], weights, strict=True)
    ]
    note = "attention of the next layer, mean of its heads; rows look at columns"
    debugger.say(drawing.heat(keys, rows, debugger.console.width, corner="", note=note))


def _print_spans(debugger: Debugger) -> None:
    if debugger.last_run is None:
        raise Mistyped("nothing has run yet")
    rows = [(name, f"{elapsed_ns / 1e3:.1f}") for name, elapsed_ns in debugger.last_run.spans]
    debugger.say(drawing.table(("span", "us"), rows, right=(1,)))


@word("lens", "l", usage="[POSITIONS]")
def lens(debugger: Debugger, rest: str) -> None:
    """What the model would say after each layer at each token, as a heat map of probabilities.

    Layers that have run are as they were; those to come as they would be with the pending edits.
    """
    point = debugger.here()
    positions = [reading.whole(one, "position") for one in rest.replace(",", " ").split()] or None
    rows: dict[int, tuple[Lens, int]] = {}
    for known in reversed([one for one in point.history if not one.place]):
        if known.layer not in rows and known.layer <= point.layer:
            found = known.lens(positions)
            for layer in found.layers:
                if layer <= known.layer:
                    rows.setdefault(layer, (found, layer))
    ahead = _lens_ahead(debugger, point, positions)
    if ahead is not None:
        rows |= {layer: (ahead, layer) for layer in ahead.layers}
    if not rows:
        raise Mistyped("no layer is left, and none before is kept: nothing to look through")
    any_lens = next(iter(rows.values()))[0]
    heads = debugger.pieces(point, point.ids[0, list(any_lens.positions)])
    lines = []
    for layer in sorted(rows):
        found, _ = rows[layer]
        best = [found[layer, position][0] for position in found.positions]
        texts = [drawing.shown(token) for token, _ in best]
        lines.append((str(layer), texts, [share for _, share in best], layer == point.layer))
    note = "to come: with the pending edits" if debugger.edits else ""
    debugger.say(drawing.heat(heads, lines, debugger.console.width, note=note))


def _lens_ahead(debugger: Debugger, point: Checkpoint, positions: Any) -> Lens | None:
    last = debugger.the_model().num_layers
    first = point.layer + 1 if point.place or not debugger.edits else point.layer
    if first > last:
        return None
    edits = [made for _, made in debugger.edits]
    made = point.resume(edits, save_at=list(range(first, last + 1)), logits="none")
    found: Lens = made.checkpoint.lens(positions)
    return found


@word("info", "i", usage="[WHAT]")
def info(debugger: Debugger, rest: str) -> None:
    """What there is: info breaks, branches, checkpoints, edits, events, model, runs, server, sessions."""
    topics: dict[str, Callable[[Debugger], None]] = {
        "breaks": show_breaks,
        "branches": _branches,
        "checkpoints": _checkpoints,
        "edits": lambda debugger: find("edit").work(debugger, ""),
        "events": _events,
        "model": _model,
        "runs": _runs,
        "server": _server,
        "sessions": _sessions,
    }
    if not rest:
        debugger.say(f"info {', '.join(topics)}")
        return
    found = [name for name in topics if name.startswith(rest)]
    if len(found) != 1:
        raise Mistyped(f"there is no info {rest!r}: {', '.join(topics)}")
    topics[found[0]](debugger)


def _branches(debugger: Debugger) -> None:
    rows = [
        (
            number,
            name,
            ", ".join(f"{drawing.shown(top.token)} {top.probability:.3f}" for top in tops[:3]),
        )
        for number, (name, tops) in enumerate(debugger.branches, 1)
    ]
    debugger.say(
        drawing.table(("", "branch", "came to"), rows, right=(0,)) if rows else "no branches"
    )


def _checkpoints(debugger: Debugger) -> None:
    rows = [
        (
            f"#{number}",
            point.place or f"after layer {point.layer}",
            " ".join(map(str, point.shape)),
            format_bytes(point.nbytes),
            "" if point.kept else "released",
        )
        for number, point in debugger.points.items()
    ]
    heads = ("", "at", "shape", "size", "")
    debugger.say(drawing.table(heads, rows, right=(3,)) if rows else "no checkpoints")


def _events(debugger: Debugger) -> None:
    events = debugger.server.events().so_far()[-EVENTS:]
    rows = [(event.number, event.kind, event.text) for event in events]
    debugger.say(drawing.table(("", "kind", "what"), rows, right=(0,)))


def _model(debugger: Debugger) -> None:
    info = debugger.the_model().info
    rows = [(name, getattr(info, name)) for name in info.__struct_fields__]
    debugger.say(drawing.table(("", ""), rows))


def _runs(debugger: Debugger) -> None:
    target = debugger.attached.target.id if debugger.attached else debugger.the_model().session_id
    rows = [
        (
            one.kind,
            one.state,
            one.layer,
            "" if one.step < 0 else one.step,
            one.positions,
            f"{one.age_s:.1f}",
        )
        for one in debugger.server.runs(target)
    ]
    heads = ("run", "state", "layer", "step", "tokens", "age s")
    debugger.say(drawing.table(heads, rows, right=(2, 3, 4, 5)) if rows else "nothing runs")


def _server(debugger: Debugger) -> None:
    status = debugger.server.status()
    rows = [("version", status.version), ("pid", status.pid), ("at", " ".join(status.endpoints))]
    rows.append(("serves", ", ".join(status.names)))
    rows += [
        (f"engine {one.index}", f"{one.device}, {one.state} {one.detail}".strip())
        for one in status.engines
    ]
    debugger.say(drawing.table(("", ""), rows))


def _sessions(debugger: Debugger) -> None:
    rows = [
        (
            f"{one.id:016x}",
            one.model,
            one.owner,
            one.pid or "",
            naming.shown(one.program) or ("" if one.yours else "not yours"),
            one.waiting,
            one.checkpoints,
        )
        for one in debugger.server.sessions()
    ]
    heads = ("session", "model", "owner", "pid", "program", "waiting", "checkpoints")
    debugger.say(drawing.table(heads, rows, right=(3, 5, 6)))


@word("help", "h", "?", usage="[WORD]")
def help_(debugger: Debugger, rest: str) -> None:
    """The words, or one of them in full."""
    if rest:
        one = find(rest)
        also = f" ({', '.join(one.aliases)})" if one.aliases else ""
        debugger.say(drawing.Text(f"{one.usage}{also}", style="bold"), drawing.Text(one.about))
        return
    rows = [
        (one.usage, " ".join(one.aliases), one.about.splitlines()[0])
        for one in sorted(WORDS.values(), key=lambda one: one.name)
    ]
    debugger.say(drawing.table(("word", "or", ""), rows))


def _no_more(words: list[str]) -> None:
    if words:
        raise Mistyped(f"{' '.join(words)!r} is more than can be printed: 'help print'")
