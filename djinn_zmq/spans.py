"""Where the time went: named durations, measured inside one process, carried in replies.

Clocks of two processes are never compared: each measures its own stretch, and what a client cannot
attribute (the two ways over the bus, and the wake-ups) is the rest, called "wire".
"""

import time
from typing import Any


class Stopwatch:
    """Adds up nanoseconds by name, in the order the names first came."""

    def __init__(self, start_ns: int | None = None) -> None:
        self.start_ns = time.perf_counter_ns() if start_ns is None else start_ns
        self.spent: dict[str, int] = {}

    def span(self, name: str) -> "Span":
        """A `with` block whose time is added under *name*, also where it raises."""
        return Span(self, name)

    def add(self, name: str, elapsed_ns: int) -> None:
        self.spent[name] = self.spent.get(name, 0) + elapsed_ns

    def elapsed_ns(self) -> int:
        return time.perf_counter_ns() - self.start_ns

    def with_rest(self, rest: str, *, first: bool) -> tuple[tuple[str, int], ...]:
        """All spans, and what is left of the time since the start under the name *rest*."""
        left = max(0, self.elapsed_ns() - sum(self.spent.values()))
        spans = tuple(self.spent.items())
        return ((rest, left), *spans) if first else (*spans, (rest, left))


class Span:
    """One stretch of a stopwatch. Not a generator's context manager: that one costs 3 us."""

    __slots__ = ("_begin_ns", "_name", "_watch")

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch = watch
        self._name = name

    def __enter__(self) -> None:
        self._begin_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._watch.add(self._name, time.perf_counter_ns() - self._begin_ns)


class Spans(tuple[tuple[str, int], ...]):
    """(name, nanoseconds) pairs in the order of the path; printed as an aligned table."""

    __slots__ = ()

    @property
    def total_ns(self) -> int:
        return sum(elapsed_ns for _, elapsed_ns in self)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        """By place as any tuple, or by name: nanoseconds, of all spans of that name."""
        if isinstance(key, str):
            found = [elapsed_ns for name, elapsed_ns in self if name == key]
            if not found:
                raise KeyError(key)
            return sum(found)
        return super().__getitem__(key)

    def __str__(self) -> str:
        total_ns = self.total_ns or 1
        width = max((len(name) for name, _ in self), default=0)
        width = max(width, len("total"))
        lines = [f"{'span':<{width}}  {'us':>10}  {'share':>6}"]
        for name, elapsed_ns in self:
            lines.append(
                f"{name:<{width}}  {elapsed_ns / 1e3:>10.1f}  {elapsed_ns / total_ns:>6.1%}"
            )
        lines.append(f"{'total':<{width}}  {self.total_ns / 1e3:>10.1f}  {1:>6.1%}")
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In a notebook it is shown as it is printed."""
        printer.text(str(self))
