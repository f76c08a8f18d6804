import numpy as np
import pytest

from djinn_zmq.probe.fits import line
from djinn_zmq.probe.samples import Samples

LAYERS = (1, 10, 20, 30, 40)
RNG = np.random.default_rng(11)


def at_depths(seconds_at, noise=0.0, rounds=8, per_round=5):
    """Samples of each depth; in each round a drift that all of them share."""
    drift = 1 + 0.2 * RNG.standard_normal((rounds, 1))
    return {
        layer: Samples(
            str(layer),
            seconds_at(layer) * drift * (1 + noise * RNG.standard_normal((rounds, per_round))),
        )
        for layer in LAYERS
    }


def test_a_line_through_points_on_a_line_is_that_line():
    exact = {layer: Samples(str(layer), np.full((4, 3), 0.5 + 0.25 * layer)) for layer in LAYERS}
    fit = line("exact", exact)
    assert fit.slope_s == pytest.approx(0.25) and fit.at_zero_s == pytest.approx(0.5)
    assert fit.r2 == pytest.approx(1) and fit.n == 60 and fit.depths == LAYERS
    assert fit.rises and not fit.flat


def test_what_grows_with_depth_is_said_to_rise_through_noise_and_drift():
    fit = line("recompute", at_depths(lambda layer: 0.001 * (1 + layer), noise=0.05))
    assert fit.rises and fit.interval.low < fit.slope_s < fit.interval.high
    assert "rises" in str(fit) and "n = 200" in str(fit)


def test_what_does_not_grow_is_flat_about_as_often_as_its_interval_promises():
    flat = sum(line("resume", at_depths(lambda _: 0.001, noise=0.05)).flat for _ in range(40))
    assert flat >= 32  # 95 % of 40 is 38; eight rounds are few for a bootstrap


def test_a_line_needs_three_depths_with_as_many_rounds():
    two = {1: Samples.of("1", [1.0]), 2: Samples.of("2", [1.0])}
    with pytest.raises(ValueError, match="three at least"):
        line("short", two)
    with pytest.raises(ValueError, match="must have as many"):
        line("uneven", two | {3: Samples.of("3", [1.0, 2.0])})
