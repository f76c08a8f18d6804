"""Durations of one thing, and what may be said of them.

Neighbouring samples resemble each other (the same clock rate, the same noisy neighbour), so the
bootstrap draws whole rounds, not single samples: an interval from single samples would be several
times too narrow. A ratio draws the same rounds on both sides, because cases that took turns in a
round saw the same machine. Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 200_000  # samples
SEED = 20261123  # the same samples give the same interval

Seconds = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """Where the true value lies with CONFIDENCE, as far as these samples can tell."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Durations of one case.

    seconds: float64 (rounds, samples a round), in the order they were taken. labels: what the case
    is, for who reads the results by program: layer, positions …
    """

    name: str
    seconds: Seconds
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seconds.ndim != 2 or not self.seconds.size:
            raise ValueError(
                f"samples of {self.name} have shape {self.seconds.shape}: "
                "(rounds, samples a round) with at least one of each is needed"
            )

    @classmethod
    def of(
        cls, name: str, seconds: Sequence[float] | Seconds, labels: Mapping[str, Any] | None = None
    ) -> "Samples":
        """Independent samples: each is a round of its own."""
        return cls(name, np.asarray(seconds, np.float64).reshape(-1, 1), labels or {})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Samples":
        """What `as_json` made."""
        return cls(found["name"], np.array(found["samples"], np.float64), found.get("labels", {}))

    @property
    def n(self) -> int:
        return int(self.seconds.size)

    @property
    def rounds(self) -> int:
        return int(self.seconds.shape[0])

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p90_s(self) -> float:
        return self.percentile_s(90)

    @property
    def p99_s(self) -> float:
        """With fewer than 100 samples this is all but the largest of them: look at `n`."""
        return self.percentile_s(99)

    def percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    def interval_s(self) -> Interval:
        """Bootstrap interval of the median, in seconds."""
        return interval_of(resampled_medians(self.seconds, round_draws(self.rounds)))

    def as_json(self) -> dict[str, Any]:
        """All of it, the samples too, as JSON values. Seconds throughout."""
        low, high = self.interval_s()
        return {
            "name": self.name,
            "unit": "s",
            "n": self.n,
            "rounds": self.rounds,
            "median": self.median_s,
            "median_low": low,
            "median_high": high,
            "p90": self.p90_s,
            "p99": self.p99_s,
            "labels": dict(self.labels),
            # Four digits: a clock that runs for microseconds does not know more.
            "samples": [[float(f"{one:.4g}") for one in row] for row in self.seconds.tolist()],
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of one case over the median of another.

    n: samples behind it, above and below the line. limit: what it should not exceed (or fall
    short of, where `at_least`), where there is such a target.
    """

    name: str
    value: float
    interval: Interval
    n: tuple[int, int]
    limit: float | None = None
    at_least: bool = False

    @property
    def held(self) -> bool | None:
        """Whether the ratio of the medians keeps the limit; None where there is none."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "low": self.interval.low,
            "high": self.interval.high,
            "n": list(self.n),
            "limit": self.limit,
            "at_least": self.at_least,
            "held": self.held,
        }


def ratio(
    above: Samples,
    below: Samples,
    *,
    name: str = "",
    limit: float | None = None,
    at_least: bool = False,
) -> Ratio:
    """*above* over *below*, at the medians. Rounds are drawn together where both had as many."""
    draws = round_draws(above.rounds)
    paired = above.rounds == below.rounds
    others = draws if paired else round_draws(below.rounds, SEED + 1)
    ratios = resampled_medians(above.seconds, draws) / resampled_medians(below.seconds, others)
    return Ratio(
        name or f"{above.name} / {below.name}",
        above.median_s / below.median_s,
        interval_of(ratios),
        (above.n, below.n),
        limit,
        at_least,
    )


def round_draws(rounds: int, seed: int = SEED) -> npt.NDArray[np.int64]:
    """int64 (RESAMPLES, rounds): the rounds of each resample."""
    return np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))


def resampled_medians(seconds: Seconds, draws: npt.NDArray[np.int64]) -> Seconds:
    """float64 (RESAMPLES,): some resamples at a time, so memory stays near that of the samples."""
    at_once = max(1, CHUNK // max(1, seconds.size))
    return np.concatenate(
        [
            np.median(seconds[draws[begin : begin + at_once]].reshape(-1, seconds.size), axis=1)
            for begin in range(0, len(draws), at_once)
        ]
    )


def interval_of(values: Seconds, confidence: float = CONFIDENCE) -> Interval:
    """The middle of resampled *values*: float64 (RESAMPLES,)."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))
