"""The debugger's state, and one typed line at a time; no terminal in it.

It stands at a checkpoint, of a run of its own or of an attached program's. Its words are in `moving`
(what goes on) and `looking` (what shows); each is a function of the debugger and the rest of the line.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from djinn_zmq.cli.debug.reading import Mistyped
from djinn_zmq.client.attach import Attached, Stop
from djinn_zmq.client.looks import Top
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.server import Server
from djinn_zmq.errors import DjinnError

Work = Callable[["Debugger", str], None]


class Word(NamedTuple):
    name: str
    aliases: tuple[str, ...]
    usage: str
    about: str  # the first line in the list of all, the rest in its own help
    work: Work


WORDS: dict[str, Word] = {}


def word(name: str, *aliases: str, usage: str = "") -> Callable[[Work], Work]:
    """The function is what *name* does; its docstring its help."""

    def add(work: Work) -> Work:
        WORDS[name] = Word(
            name, aliases, f"{name} {usage}".strip(), inspect.getdoc(work) or "", work
        )
        return work

    return add


def find(typed: str) -> Word:
    """By name, alias, or the beginning of one name only. Raises Mistyped."""
    for one in WORDS.values():
        if typed == one.name or typed in one.aliases:
            return one
    begins = [one for one in WORDS.values() if one.name.startswith(typed)]
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise Mistyped(f"{typed!r} may be {', '.join(one.name for one in begins)}")
    near = difflib.get_close_matches(typed, WORDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else "'help' lists the words"
    raise Mistyped(f"{typed!r} is no word of the debugger: {hint}")


@dataclass(slots=True)
class Breakpoint:
    text: str
    stop: Any  # as `stop_at` takes it


class Debugger:
    """server: to which it speaks. console: what it shows goes there."""

    def __init__(self, server: Server, console: Console, model: Model | None = None) -> None:
        self.server = server
        self.console = console
        self.model = model
        self.prompt = ""
        self.breaks: dict[int, Breakpoint] = {}
        self.edits: list[tuple[str, Any]] = []
        self.point: Checkpoint | None = None  # where it stands
        self.stop: Stop | None = None  # of an attached program's, where that is held
        self.attached: Attached | None = None
        self.outcome: Run | None = None  # the last one that was finished
        self.last_run: Run | None = None
        self.points: dict[int, Checkpoint] = {}  # by the number under which each was shown
        self.branches: list[tuple[str, list[Top]]] = []
        self.over = False
        self._count = 0
        self._models: dict[int, Model] = {}  # by the numbers of `points`: whose each is

    # ---- a line

    def do(self, line: str) -> bool:
        """Carry out a typed line. False where it was refused; the reason is shown, in one line."""
        line = line.strip()
        if not line or line.startswith("#"):
            return True
        typed, _, rest = line.partition(" ")
        try:
            find(typed).work(self, rest.strip())
        except DjinnError as exc:
            self.refuse(str(exc))
            return False
        except KeyboardInterrupt:
            self.say("[yellow]cancelled[/]")
            return False
        return True

    def say(self, *what: Any) -> None:
        for one in what:
            self.console.print(one, highlight=False)

    def refuse(self, text: str) -> None:
        line = Text(f"error: {' '.join(text.split())}", style="red")
        self.console.print(line, soft_wrap=True, highlight=False)

    # ---- what words share

    def the_model(self) -> Model:
        if self.model is None:
            raise Mistyped("no model: 'model NAME' chooses one, 'info server' lists them")
        return self.model

    def here(self) -> Checkpoint:
        if self.point is None:
            raise Mistyped("stopped nowhere: set a breakpoint ('break 2') and 'run PROMPT'")
        return self.point

    def number(self, point: Checkpoint) -> int:
        """Under which *point* is shown."""
        for number, known in self.points.items():
            if known is point:
                return number
        self._count += 1
        self.points[self._count] = point
        self._models[self._count] = self.the_model()
        return self._count

    def numbered(self, number: int) -> Checkpoint:
        if number not in self.points:
            known = ", ".join(f"#{one}" for one in self.points) or "none yet"
            raise Mistyped(f"there is no checkpoint #{number}: {known}")
        return self.points[number]

    def stops(self) -> list[Any]:
        return [one.stop for one in self.breaks.values()]

    def stand(self, point: Checkpoint | None, stop: Stop | None = None) -> None:
        self.point, self.stop, self.edits = point, stop, []

    def choose(self, model: Model) -> None:
        """Work on *model* from now on. What another has come to is no measure of what this one does."""
        if model is not self.model:
            self.outcome = None
        self.model = model
        self.stand(None)

    def end(self) -> None:
        """It is attached no more, whatever way that came."""
        self.attached = None
        self.stand(None)

    def pieces(self, point: Checkpoint, ids: Iterable[int]) -> list[str]:
        """Tokens' texts as *point*'s model has them, their ids where that has no tokenizer."""
        numbers = [int(one) for one in ids]
        texts = self._models[self.number(point)].pieces(numbers)
        return [text.strip() or str(one) for text, one in zip(texts, numbers, strict=True)]
