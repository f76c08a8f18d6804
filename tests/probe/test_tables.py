import numpy as np
import pytest

from djinn_zmq.probe import tables
from djinn_zmq.probe.samples import Samples, ratio


def test_a_row_carries_its_number_of_samples_and_its_unit():
    text = tables.of_samples("no-op", [Samples("ipc", np.full((3, 41), 20e-6))])
    head, row = text.splitlines()
    assert head.startswith("no-op, us") and head.split()[-1] == "n"
    assert row.split() == ["ipc", "20.0", "20.0", "20.0", "20.0", "20.0", "123"]


def test_a_ratio_carries_both_counts_and_whether_its_target_held():
    slow, fast = Samples.of("slow", [3.0] * 8), Samples.of("fast", [2.0] * 5)
    text = tables.of_ratios("against bare", [ratio(slow, fast, limit=1.3)])
    assert text.splitlines()[1].split()[-5:] == ["1.50", "8/5", "<=", "1.3", "missed"]


def test_a_target_from_below_says_so():
    slow, fast = Samples.of("slow", [8.0] * 8), Samples.of("fast", [2.0] * 5)
    text = tables.of_ratios("faster", [ratio(slow, fast, limit=3, at_least=True)])
    assert text.splitlines()[1].split()[-3:] == [">=", "3", "held"]


def test_columns_are_aligned_whatever_stands_in_them():
    lines = tables.aligned(["a", "b"], [["x", "1"], ["longer", "22222"]]).splitlines()
    assert lines == ["a           b", "x           1", "longer  22222"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_numbers_have_three_digits_that_mean_something(value, text):
    assert tables.number(value) == text
