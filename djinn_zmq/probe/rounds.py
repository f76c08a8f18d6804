"""Taking turns: A B C A B C, so that all cases meet the same machine.

A machine's speed drifts within a minute by more than most differences worth measuring. Cases that
are measured one after the other compare moments; cases that take turns compare each other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from djinn_zmq.probe.samples import Samples

Case = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How often and in which rhythm. One call is one sample.

    gap_s: sleep before each call, untimed; 0: back to back. settle: untimed calls (with their
    gaps) at the start of each turn, because the turn before left its own code in the caches.
    """

    rounds: int
    per_round: int
    gap_s: float = 0.0
    warm_up: int = 20  # untimed calls of each case before the first round
    settle: int = 2

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


def interleaved(cases: Mapping[str, Case], plan: Plan) -> dict[str, Samples]:
    """Call every case `plan.rounds` times for a turn of `plan.per_round` samples."""
    for case in cases.values():
        for _ in range(plan.warm_up):
            case()
    seconds = {name: np.empty((plan.rounds, plan.per_round)) for name in cases}
    for turn in range(plan.rounds):
        for name, case in cases.items():
            _settle(case, plan)
            _take(case, plan.gap_s, seconds[name][turn])
    return {name: Samples(name, taken) for name, taken in seconds.items()}


def _settle(case: Case, plan: Plan) -> None:
    for _ in range(plan.settle):
        if plan.gap_s:
            time.sleep(plan.gap_s)
        case()


def _take(case: Case, gap_s: float, into: np.ndarray) -> None:
    """Fill *into* (float64 (samples,)) with the seconds of one call each."""
    clock, sleep = time.perf_counter_ns, time.sleep
    for place in range(len(into)):
        if gap_s:
            sleep(gap_s)
        begin = clock()
        case()
        into[place] = (clock() - begin) / 1e9
