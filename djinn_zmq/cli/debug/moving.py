"""Words that go somewhere: run, continue, step, back, edit, branch, attach."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from djinn_zmq.cli import naming
from djinn_zmq.cli.debug import drawing, reading
from djinn_zmq.cli.debug.breakpoints import ahead_of, saved_before
from djinn_zmq.cli.debug.debugger import Debugger, word
from djinn_zmq.cli.debug.reading import Mistyped
from djinn_zmq.client.looks import Top
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.errors import DjinnError, EditError, LayerError, Lost, UnknownStop
from djinn_zmq.settings import counted

NOT_WAITING = "[yellow]not waiting any more[/]; still attached: 'continue' waits again"
WAIT_S = 0.2  # an attached program's next stop is looked for this often, Ctrl-C heard between
TOP = 5


@word("run", "r", usage="[PROMPT]")
def run(debugger: Debugger, rest: str) -> None:
    """Run a prompt, to the first breakpoint or to the end; without one, the last prompt again."""
    model = debugger.the_model()
    _only_alone(debugger, "run")
    prompt = rest.strip("\"'") or debugger.prompt
    if not prompt:
        raise Mistyped("a prompt is missing: run the capital of france is")
    made = model.run(prompt, stop_at=debugger.stops() or None, save_at=saved_before(debugger, -1))
    debugger.prompt = prompt
    _arrived(debugger, made)


@word("model", usage="[NAME]")
def model(debugger: Debugger, rest: str) -> None:
    """Choose a model: a served name, a directory or a hub id. Without one, say which it is."""
    if not rest:
        debugger.say(str(debugger.the_model()).replace("[", r"\["))
        return
    _only_alone(debugger, "model")
    chosen = debugger.server.model(rest)
    debugger.choose(chosen)
    debugger.say(f"[green]{chosen.name}[/]: {counted(chosen.num_layers, 'layer')}")


@word("continue", "c", usage="")
def continue_(debugger: Debugger, rest: str) -> None:
    """Go on from here with the pending edits, to the next breakpoint or to the end.

    Attached: let the program go on, and wait for its next stop (Ctrl-C: stop waiting).
    """
    _nothing_more("continue", rest)
    if debugger.attached is not None:
        try:
            _let_go(debugger)
            _await(debugger)
        except KeyboardInterrupt:  # an instant before it waits, or behind
            debugger.say(NOT_WAITING)
        return
    point = debugger.here()
    saves = saved_before(debugger, point.layer)
    with _pending(debugger) as edits:
        made = point.resume(edits, stop_at=ahead_of(debugger), save_at=saves)
    _arrived(debugger, made)


@word("step", "s", usage="[LAYERS]")
def step(debugger: Debugger, rest: str) -> None:
    """Go on by one layer, or by so many, whatever breakpoints say."""
    count = reading.whole(rest, "number of layers") if rest else 1
    if count < 1:
        raise Mistyped(f"step {count}: at least 1; 'back' goes back")
    point = debugger.here()
    last = debugger.the_model().num_layers
    target = min(point.layer + count, last)
    if debugger.attached is not None:
        if debugger.stop is None or not debugger.stop.held:
            raise Mistyped("the program is not held: 'continue' waits for its next stop")
        if point.layer >= last:
            raise Mistyped("there is no layer left: 'continue' lets the program go on")
        debugger.attached.breaks(target)
        try:
            _let_go(debugger)
            _await(debugger)
        finally:
            if debugger.attached is not None:  # the program may have ended meanwhile
                debugger.attached.breaks(debugger.stops())
        return
    if point.layer >= last:
        raise Mistyped("there is no layer left: 'continue' runs what is behind the layers")
    saves = list(range(point.layer + 1, target + 1))
    with _pending(debugger) as edits:
        made = point.resume(edits, stop_at=target, save_at=saves)
    _arrived(debugger, made)


@word("back", usage="[CHECKPOINTS]")
def back(debugger: Debugger, rest: str) -> None:
    """Step back to the checkpoint before this one, a layer mostly; or by so many."""
    count = reading.whole(rest, "number of checkpoints") if rest else 1
    if count < 1:
        raise Mistyped(f"back {count}: at least 1; 'step' goes on")
    if debugger.stop is not None:
        raise Mistyped("a program's own run goes forwards only: 'branch' tries what else might be")
    history = debugger.here().history
    if len(history) <= count:
        raise Mistyped(f"back {count}: {counted(len(history) - 1, 'checkpoint')} before this one")
    debugger.stand(history[-1 - count])
    show_place(debugger)


@word("edit", "e", usage="[EDIT [AT]]")
def edit(debugger: Debugger, rest: str) -> None:
    """Change what flows here; made when it goes on. Without an edit, list them; 'edit clear' drops them.

    zero · scale FACTOR · add VALUE · set VALUE · lerp VALUE WEIGHT · project VECTOR · patch #N · skip N
    VALUE: 0.5, or 1,0,-1, or vector.npy. AT: [0, -1] is the last position of the first prompt.
    edit patch #3 [0, 2] [0, 4] puts position 2 of checkpoint #3 at position 4.
    """
    if not rest:
        if not debugger.edits:
            debugger.say("no edits are pending")
        for number, (text, _) in enumerate(debugger.edits, 1):
            debugger.say(f"  {number}  {drawing.Text(text).markup}")
        return
    debugger.here()
    if rest == "clear":
        debugger.edits = []
        return
    made = reading.edit(rest, debugger.numbered)
    debugger.edits.append((rest, made))
    debugger.say(drawing.Text(f"pending: {rest}", style="yellow"))


@word("branch", usage="[EDIT [AT]]")
def branch(debugger: Debugger, rest: str) -> None:
    """Try it: run to the end from here with the pending edits (and this one), and stay here.

    An attached program learns nothing of it. 'info branches' lists what came of them.
    """
    point = debugger.here()
    more = [reading.edit(rest, debugger.numbered)] if rest else []
    plain = made = point.resume()
    with _pending(debugger) as edits:
        if edits or more:
            made = point.resume([*edits, *more])
    found = made.top(TOP)
    names = [text for text, _ in debugger.edits] + ([rest] if rest else [])
    debugger.branches.append(("; ".join(names) or "as it is", found))
    debugger.say(drawing.tops(found, None if made is plain else _shares(plain, found)))


@word("attach", usage="SESSION|PID")
def attach(debugger: Debugger, rest: str) -> None:
    """Attach to a session of another program of yours, by its number's beginning or its process.

    Its runs stop at the breakpoints; it sees nothing but time. 'info sessions' lists them. Then
    'continue' waits for its next stop.
    """
    if not rest:
        raise Mistyped("a session or a process is missing: 'info sessions' lists them")
    _only_alone(debugger, "attach")
    session = _named(debugger, rest)
    chosen = debugger.server.model(session.model)
    debugger.attached = debugger.server.attach(session, stop_at=debugger.stops() or None)
    debugger.choose(chosen)
    program = naming.shown(session.program)
    whose = f" of {program} (pid {session.pid})" if program else ""
    debugger.say(drawing.Text(f"attached to {session.id:016x} on {session.model}{whose}"))


@word("detach", usage="")
def detach(debugger: Debugger, rest: str) -> None:
    """Leave the program alone: what is held goes on, with the pending edits."""
    _nothing_more("detach", rest)
    if debugger.attached is None:
        raise Mistyped("attached to nothing")
    if debugger.edits:
        _let_go(debugger)
    try:
        debugger.attached.detach()
    finally:  # an engine that is gone cannot be told, and holds nothing
        debugger.end()
    debugger.say("detached")


@word("quit", "q", "exit", usage="")
def quit_(debugger: Debugger, rest: str) -> None:
    """Leave (Ctrl-D): what an attached program is held at goes on as it is."""
    _nothing_more("quit", rest)
    debugger.over = True


# ---- what they share


def show_place(debugger: Debugger) -> None:
    """One line, and the model's path: where it stands now."""
    point = debugger.here()
    number = debugger.number(point)
    where = f"at {point.place}" if point.place else f"after layer {point.layer}"
    step_of = debugger.stop.step if debugger.stop is not None else None
    step_text = "" if step_of is None else f", step {step_of}"
    line = drawing.Text(f"#{number} stopped {where}{step_text}", style="bold yellow")
    layers = debugger.the_model().num_layers
    fixed = [one.stop for one in debugger.breaks.values() if isinstance(one.stop, int)]
    if layers <= 64:
        line.append("   ")
        line.append_text(drawing.path(layers, point.layer, point.place, fixed))
    debugger.say(line)


def _arrived(debugger: Debugger, made: Run) -> None:
    """*made* has stopped, or is over."""
    debugger.last_run = made
    if made.stopped:
        debugger.stand(made.checkpoint)
        show_place(debugger)
        return
    found = made.top(TOP)
    before = debugger.outcome
    comparable = before is not None and np.array_equal(before.ids, made.ids)
    old = _shares(before, found) if comparable and before is not None else None
    debugger.outcome = made
    debugger.stand(made.checkpoint if made.checkpoints else debugger.point)
    debugger.say(drawing.Text("finished", style="bold green"), drawing.tops(found, old))


def _shares(made: Run, tops: list[Top]) -> list[float]:
    """How likely *tops* were in another run."""
    logits = np.asarray(made.logits, np.float64)[0]
    shares = np.exp(logits - logits.max())
    return [float(shares[top.id] / shares.sum()) for top in tops]


@contextmanager
def _pending(debugger: Debugger) -> Iterator[list[Any]]:
    """The pending edits, to be made; where one is refused they stay, and it says how to be rid of them."""
    try:
        yield [made for _, made in debugger.edits]
    except (EditError, LayerError) as exc:
        if not debugger.edits:
            raise
        raise Mistyped(f"{exc} ('edit clear' drops the pending edits)") from exc


def _let_go(debugger: Debugger) -> None:
    """Let the program's held run go on, with the edits."""
    stop = debugger.stop
    if stop is not None and stop.held:
        try:
            with _pending(debugger) as edits:
                stop.continue_(edits)
        except (UnknownStop, Lost) as exc:  # what it does next is to be seen, or that it is dead
            debugger.say(f"[yellow]gone[/]: {exc}")
    debugger.stand(None)


def _await(debugger: Debugger) -> None:
    """The attached program's next stop. Ctrl-C ends the waiting, not the attachment."""
    attached = debugger.attached
    assert attached is not None
    passed = len(attached.passed)
    try:
        with _interrupted() as interrupted:
            stop = None
            while stop is None and not attached.over and not interrupted():
                stop = attached.wait(WAIT_S)
    except DjinnError:
        if attached.over:  # its engine died, say
            debugger.end()
        raise
    for kind in attached.passed[passed:]:
        debugger.say(f"a {kind} passed: it does not stop at breakpoints")
    if stop is not None:
        debugger.stand(stop.checkpoint, stop)
        show_place(debugger)
    elif attached.over:
        debugger.end()
        debugger.say(f"[yellow]detached[/]: {attached.reason}")
    else:
        debugger.say(NOT_WAITING)


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C has come; it interrupts nothing meanwhile."""
    came: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: bool(came)
        return
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _named(debugger: Debugger, text: str) -> Any:
    """The session that *text* names."""
    yours = [one for one in debugger.server.sessions() if one.yours]
    mine = {debugger.model.session_id} if debugger.model is not None else set()
    begin = text.removeprefix("0x") or text  # "0x" alone is how none begins
    # Short processes' numbers are also how some session's begins: that is to be said, not chosen.
    found = [
        one
        for one in yours
        if f"{one.id:016x}".startswith(begin) or (str(one.pid) == text and one.id not in mine)
    ]
    if not found:
        raise Mistyped(f"no session of yours is {text}: 'info sessions' lists them")
    if len(found) > 1:
        which = ", ".join(f"{one.id:016x}" for one in found)
        raise Mistyped(f"{text} may be {which}")
    return found[0]


def _only_alone(debugger: Debugger, what: str) -> None:
    if debugger.attached is not None:
        raise Mistyped(f"attached to a program: 'detach' before {what!r}")


def _nothing_more(what: str, rest: str) -> None:
    if rest:
        raise Mistyped(f"{what} takes nothing more, got {rest!r}")


def checkpoint_of(debugger: Debugger, text: str) -> Checkpoint:
    return reading.point(text, debugger.numbered) if text else debugger.here()
