"""The debugger in a terminal: a prompt with history and completion, one line after another."""

import signal
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from djinn_zmq.cli.debug.debugger import WORDS, Debugger
from djinn_zmq.errors import DjinnError
from djinn_zmq.settings import cache_dir

EDITS = ("zero", "scale", "add", "set", "lerp", "project", "patch", "skip", "clear")
PRINTS = ("top", "norms", "diff", "attention", "spans")
TOPICS = ("breaks", "branches", "checkpoints", "edits", "events", "model", "runs", "server")
TOPICS += ("sessions",)
PARTS = ("self_attn", "self_attn.heads", "mlp")


class Words(Completer):
    """Words first, then what each of them takes."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        typed = before.split(" ")[-1]
        for one in sorted(set(self._candidates(before))):
            if one.startswith(typed):
                yield Completion(one, start_position=-len(typed))

    def _candidates(self, before: str) -> Iterable[str]:
        words = before.split()
        if not words or (len(words) == 1 and not before.endswith(" ")):
            return WORDS
        name = next(
            (one.name for one in WORDS.values() if words[0] in (one.name, *one.aliases)), ""
        )
        second = len(words) < 2 or (len(words) == 2 and not before.endswith(" "))
        if not second:
            return ("if", "nan", "norm", "token", "step") if name == "break" else ()
        return {
            "break": self._places,
            "watch": lambda: ("nan", "norm", "token", "step"),
            "edit": lambda: EDITS,
            "branch": lambda: EDITS[:-1],
            "print": lambda: PRINTS,
            "info": lambda: TOPICS,
            "help": lambda: WORDS,
            "attach": self._sessions,
            "model": lambda: self._debugger.server.welcome.models,  # type: ignore[union-attr]
        }.get(name, lambda: ())()

    def _places(self) -> Iterable[str]:
        model = self._debugger.model
        layers = range(model.num_layers if model is not None else 0)
        yield from ("embedding", "norm", "head", *(f".{part}" for part in PARTS))
        yield from (str(layer) for layer in (*layers, len(layers)))
        yield from (f"layers.{layer}.{part}" for layer in layers for part in PARTS)

    def _sessions(self) -> Iterable[str]:
        try:
            return [f"{one.id:016x}" for one in self._debugger.server.sessions() if one.yours]
        except DjinnError:
            return ()


class _Interrupts:
    """Ctrl-C interrupts a line at work, once; between two lines it would meet prompt_toolkit setting
    itself up, and does nothing."""

    wanted = False

    def __call__(self, *_: object) -> None:
        if self.wanted:
            self.wanted = False
            raise KeyboardInterrupt


def interact(debugger: Debugger) -> None:
    """Until it is left. Ctrl-C drops the line that is being typed, or cancels what one does."""
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=Words(debugger),
        auto_suggest=AutoSuggestFromHistory(),
        complete_while_typing=False,
    )
    interrupts = _Interrupts()
    while not debugger.over:
        signal.signal(signal.SIGINT, interrupts)
        try:
            line = session.prompt(lambda: ANSI(f"\x1b[1;36m{_standing(debugger)}\x1b[0m "))
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
        try:
            interrupts.wanted = True
            debugger.do(line)
            interrupts.wanted = False
        except KeyboardInterrupt:  # before the line was begun, or when it was done
            continue


def _standing(debugger: Debugger) -> str:
    name = debugger.model.name if debugger.model is not None else "djinn"
    if debugger.attached is not None:
        name = f"{name} @{debugger.attached.target.id:016x}"[: len(name) + 10]
    point = debugger.point
    if point is None:
        return f"({name})"
    return f"({name} {point.place or point.layer})"


def _history() -> History:
    path: Path = cache_dir() / "debug_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # nowhere to write: a history of this time only
        return InMemoryHistory()
    return FileHistory(str(path))
