"""Does a duration grow with depth? A line through the medians, and how sure its slope is.

The interval is a bootstrap over whole rounds, as in `samples`, and every depth draws the same
rounds: in a round all depths took turns on the same machine, so what the machine did meanwhile moves
them together and not the slope. (An interval from the residuals of single samples would take
neighbouring samples for independent ones and be several times too narrow.) It is a 99 % interval: a
run fits many lines, and of those that are flat one in a hundred is to look otherwise, not one in
twenty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from djinn_zmq.probe.samples import (
    SEED,
    Interval,
    Samples,
    interval_of,
    resampled_medians,
    round_draws,
)

CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Fit:
    """seconds = at_zero_s + slope_s * depth. slope_s: seconds a layer; r2: of the medians.

    n: samples behind it. depths: where they were taken. spread: largest median over smallest.
    """

    name: str
    slope_s: float
    interval: Interval
    at_zero_s: float
    r2: float
    n: int
    depths: tuple[int, ...]
    spread: float

    @property
    def flat(self) -> bool:
        """The slope's interval contains zero: these samples show no growth with depth."""
        return self.interval.low <= 0 <= self.interval.high

    @property
    def rises(self) -> bool:
        return self.interval.low > 0

    def __str__(self) -> str:
        low, high = (1e6 * end for end in self.interval)
        verdict = "rises" if self.rises else "flat" if self.flat else "falls"
        return (
            f"{self.name}: {1e6 * self.slope_s:.3g} us a layer "
            f"({CONFIDENCE:.0%}: {low:.3g} to {high:.3g}), "
            f"r² {self.r2:.3f}, n = {self.n}: {verdict}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": "s/layer",
            "slope": self.slope_s,
            "low": self.interval.low,
            "high": self.interval.high,
            "at_zero": self.at_zero_s,
            "r2": self.r2,
            "n": self.n,
            "depths": list(self.depths),
            "spread": self.spread,
            "flat": self.flat,
        }


def line(name: str, by_depth: Mapping[int, Samples]) -> Fit:
    """A line through the medians of each depth. Raises ValueError for fewer than three depths."""
    depths = sorted(by_depth)
    if len(depths) < 3:
        raise ValueError(
            f"{name}: a line through {len(depths)} depths says nothing: three at least"
        )
    samples = [by_depth[depth] for depth in depths]
    rounds = {one.rounds for one in samples}
    if len(rounds) > 1:
        raise ValueError(f"{name}: {sorted(rounds)} rounds: every depth must have as many")
    x = np.array(depths, np.float64)
    medians = np.array([one.median_s for one in samples])
    slope, at_zero = _least_squares(x, medians)
    draws = round_draws(rounds.pop(), SEED)
    resampled = np.array([resampled_medians(one.seconds, draws) for one in samples])
    slopes = _least_squares(x, resampled)[0]
    rest = medians - at_zero - slope * x
    spread = float(((medians - medians.mean()) ** 2).sum())
    return Fit(
        name,
        float(slope),
        interval_of(np.asarray(slopes), CONFIDENCE),
        float(at_zero),
        1 - float((rest**2).sum()) / spread if spread else 1.0,
        sum(one.n for one in samples),
        tuple(depths),
        float(medians.max() / medians.min()),
    )


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """(slope, value at zero) of lines through y: float64 (depths,) or (depths, lines)."""
    centred = x - x.mean()
    slope = centred @ (y - y.mean(0)) / (centred @ centred)
    return slope, y.mean(0) - slope * x.mean()
