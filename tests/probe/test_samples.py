import numpy as np
import pytest

from djinn_zmq.probe.samples import Interval, Ratio, Samples, ratio


def test_the_medians_and_percentiles_of_known_data_are_the_known_ones():
    samples = Samples.of("known", [value / 1000 for value in range(1, 102)])
    assert samples.n == 101
    assert samples.median_s == pytest.approx(0.051)
    assert samples.p90_s == pytest.approx(0.091)
    assert samples.p99_s == pytest.approx(0.100)


def test_an_interval_of_equal_samples_is_a_point():
    assert Samples.of("same", [0.25] * 12).interval_s() == Interval(0.25, 0.25)


def test_an_interval_holds_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        low, high = Samples.of("normal", rng.normal(10, 1, 80)).interval_s()
        held += low <= 10 <= high
    assert 52 <= held <= 60  # 95 % of 60 is 57


def test_the_same_samples_give_the_same_interval():
    seconds = np.random.default_rng(1).random(50)
    assert Samples.of("a", seconds).interval_s() == Samples.of("b", seconds).interval_s()


def test_a_round_is_drawn_whole_so_drift_between_rounds_widens_the_interval():
    drifting = np.repeat(np.arange(1.0, 9.0), 50).reshape(8, 50)
    by_round = Samples("drift", drifting).interval_s()
    by_sample = Samples.of("drift", drifting.reshape(-1)).interval_s()
    assert by_round.high - by_round.low > 1.5 * (by_sample.high - by_sample.low)


def test_a_ratio_pairs_rounds_so_drift_that_both_saw_cancels():
    drift = np.repeat(np.arange(1.0, 9.0), 50).reshape(8, 50)
    found = ratio(Samples("twice", 2 * drift), Samples("once", drift))
    assert found.value == pytest.approx(2)
    assert found.interval == pytest.approx((2, 2))
    assert found.n == (400, 400)


def test_a_ratio_of_different_numbers_of_rounds_is_drawn_apart():
    found = ratio(Samples.of("a", [3.0] * 7), Samples.of("b", [2.0] * 5))
    assert found.value == pytest.approx(1.5)
    assert found.n == (7, 5)


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "held"),
    [(1.3, 1.3, False, True), (1.31, 1.3, False, False), (3.0, 3.0, True, True)]
    + [(2.9, 3.0, True, False), (9.9, None, False, None)],
)
def test_a_limit_is_kept_or_missed_at_the_median(value, limit, at_least, held):
    assert Ratio("r", value, Interval(0, 9), (1, 1), limit, at_least).held is held


def test_samples_without_any_are_refused():
    with pytest.raises(ValueError, match="samples of nothing"):
        Samples("nothing", np.empty((3, 0)))


def test_what_goes_into_json_carries_unit_count_and_every_sample():
    found = Samples("case", np.array([[0.5, 1.5], [2.5, 3.5]])).as_json()
    assert (found["unit"], found["n"], found["rounds"]) == ("s", 4, 2)
    assert found["samples"] == [[0.5, 1.5], [2.5, 3.5]]
    assert found["median_low"] <= found["median"] == 2.0 <= found["median_high"]
