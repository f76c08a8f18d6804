"""Taking turns: A B C A B C, so that all cases meet the same machine.

A machine's speed drifts within a minute by more than most differences worth measuring. Cases that
are measured one after the other compare moments; cases that take turns compare each other.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_zmq.probe.samples import Samples

Case = Callable[[], object]
Clock = Callable[[Case], float]  # makes one call, returns its seconds
Turn = npt.NDArray[np.float64]  # seconds of one case in one round: (samples a round,)


def host_clock(case: Case) -> float:
    """From before the call until it has returned."""
    begin = time.perf_counter_ns()
    case()
    return (time.perf_counter_ns() - begin) / 1e9


def told_clock(case: Case) -> float:
    """What the call itself measured and returned, in seconds: for work in another process."""
    return float(case())  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Task:
    """A case with more to say: before: untimed, in front of each call. clock: what times it. group: those
    of one name take turns call by call, where a turn would be long beside the machine's drift."""

    call: Case
    before: Case | None = None
    clock: Clock = host_clock
    group: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How often and in which rhythm. One call is one sample.

    gap_s: sleep before each call, untimed; 0: back to back. settle: untimed calls (with their
    gaps) at the start of each turn, because the turn before left its own code in the caches.
    there_and_back: every second round runs C B A, so that no case always follows the same one.
    """

    rounds: int
    per_round: int
    gap_s: float = 0.0
    warm_up: int = 20  # untimed calls of each case before the first round
    settle: int = 2
    there_and_back: bool = False

    @classmethod
    def of(
        cls, samples: int, rounds: int, *, gap_s: float = 0.0, warm_up: int = 20, settle: int = 2
    ) -> "Plan":
        """At least *samples* for each case, spread over *rounds*, or fewer: two a round or more."""
        rounds = max(1, min(rounds, samples // 2))
        return cls(rounds, -(-samples // rounds), gap_s, warm_up, settle)

    @property
    def samples(self) -> int:
        return self.rounds * self.per_round


def interleaved(
    cases: Mapping[str, Case | Task],
    plan: Plan,
    *,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    on_turn: Callable[[str], None] | None = None,
    into: list[Samples] | None = None,
) -> dict[str, Samples]:
    """Call every case `plan.rounds` times for a turn of `plan.per_round` samples.

    labels: of each case's samples. on_turn: told a case's name when it has had a turn. into: gets
    the samples as well; where a round breaks off, those of the rounds before it.
    """
    turns: list[dict[str, Turn]] = []
    taken: dict[str, Samples] = {}
    try:
        turns.extend(each_round(cases, plan, on_turn=on_turn))
    finally:
        if turns:
            taken = {
                name: Samples(
                    name, np.stack([turn[name] for turn in turns]), (labels or {}).get(name, {})
                )
                for name in cases
            }
            if into is not None:
                into += taken.values()
    return taken


def each_round(
    cases: Mapping[str, Case | Task],
    plan: Plan,
    *,
    first: int = 0,
    on_turn: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Turn]]:
    """The rounds from *first* on, one by one, so that each can be put away before the next."""
    tasks = {name: _task(case) for name, case in cases.items()}
    for task in tasks.values():
        for _ in range(plan.warm_up):
            _once(task, 0.0)
    for number in range(first, plan.rounds):
        names = list(tasks)
        if plan.there_and_back and number % 2:
            names.reverse()
        taken: dict[str, Turn] = {}
        for group in _groups(names, tasks):
            for name in group:
                for _ in range(plan.settle):
                    _once(tasks[name], plan.gap_s)
            seconds = np.array(
                [[_once(tasks[name], plan.gap_s) for name in group] for _ in range(plan.per_round)],
                np.float64,
            )
            for place, name in enumerate(group):
                taken[name] = seconds[:, place]
                if on_turn is not None:
                    on_turn(name)
        yield {name: taken[name] for name in tasks}


def _groups(names: list[str], tasks: Mapping[str, Task]) -> list[list[str]]:
    """Those that take turns call by call together, where the first of them is; any other alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = tasks[name].group
        groups.setdefault(f"group {group}" if group else f"case {name}", []).append(name)
    return list(groups.values())


def _task(case: Case | Task) -> Task:
    return case if isinstance(case, Task) else Task(case)


def _once(task: Task, gap_s: float) -> float:
    if task.before is not None:
        task.before()
    if gap_s:
        time.sleep(gap_s)
    return task.clock(task.call)
