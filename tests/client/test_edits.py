"""Edits as they are made by hand: what they say of themselves, and what is none."""

import ml_dtypes
import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client.edits import LARGEST, placed_edits
from djinn_zmq.errors import EditError, RequestError
from djinn_zmq.wire import edits as wire


class Point:
    """What of a checkpoint an edit looks at."""

    id, hidden, resume = 7, None, None

    def __repr__(self) -> str:
        return "<checkpoint 7>"


POINT = Point()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (djinn.Zero(), "Zero()"),
        (djinn.Zero(at=(0, -1, 3)), "Zero(at=(0, -1, 3))"),
        (djinn.Scale(2, at=-1), "Scale(2.0, at=-1)"),
        (djinn.Add(np.ones(3), at=(..., slice(1, None))), "Add(float64 (3,), at=(..., 1:))"),
        (djinn.Set(0.5, at=(0, [1, 2])), "Set(float64 (), at=(0, [1, 2]))"),
        (djinn.Lerp(np.ones(3, np.float32), 0.5), "Lerp(float32 (3,), 0.5)"),
        (djinn.Lerp(1, 0.5, at=slice(0, 9, 2)), "Lerp(float32 (), 0.5, at=0:9:2)"),
        (djinn.Project([1.0, 0.0], at=(0, 1)), "Project(float64 (2,), at=(0, 1))"),
        (djinn.Patch(POINT, at=(0, 3)), f"Patch({POINT!r}, at=(0, 3))"),
        (djinn.Patch(POINT, (0, 3), (0, 4)), f"Patch({POINT!r}, at=(0, 3), source_at=(0, 4))"),
        (djinn.Skip("layers.2"), "Skip('layers.2')"),
    ],
)
def test_an_edit_says_what_it_does_and_where(edit, said):
    assert repr(edit) == said


def test_a_checkpoint_in_the_place_of_values_is_refused_with_what_to_give():
    with pytest.raises(EditError, match="Lerp.*hidden.*Patch"):
        djinn.Lerp(POINT, 0.5)


@pytest.mark.parametrize("several", [list, tuple, iter, lambda edits: (edit for edit in edits)])
def test_edits_may_be_any_list_of_them_and_are_made_in_its_order(several):
    edits = several([djinn.Scale(2.0), djinn.Zero(at=(0, -1))])
    with pytest.raises(StopIteration) as end:
        next(placed_edits(edits, None, "bfloat16"))
    assert [type(edit) for edit in end.value.value] == [wire.Scale, wire.Zero]


@pytest.mark.parametrize(
    "given", [djinn.Zero, [djinn.Scale], None, [3], "zero", {"zero": 1}, np.zeros(3), iter([3])]
)
def test_what_is_no_edit_is_refused_before_anything_travels(given):
    with pytest.raises(RequestError, match="is no edit"):
        list(placed_edits(given, None, "bfloat16"))


@pytest.mark.parametrize(
    ("edit", "dtype", "said"),
    [
        (djinn.Add(1e39), "bfloat16", r"edit 0 \(Add\): a value of 1e\+39: bfloat16 holds -3.38953e"),
        (djinn.Set([1.0, -7e4], at=(0, 0, [1, 2])), "float16", "a value of -70000: float16 holds -65504"),
        (djinn.Set(np.float32(3.4e38)), "bfloat16", "a value of 3.4e.38"),  # else rounded to infinity
        (djinn.Lerp(-1e39, 0.5), "float32", "a value of -1e.39: float32 holds"),
        (djinn.Lerp(1.0, 1e39), "bfloat16", "a weight of 1e.39: float32 holds"),
        (djinn.Scale(-1e39), "bfloat16", r"edit 0 \(Scale\): a factor of -1e.39: float32 holds"),
    ],
)  # fmt: skip
def test_a_number_that_would_be_infinite_where_it_is_put_is_refused_before_anything_travels(
    edit, dtype, said
):
    with pytest.raises(EditError, match=said):
        list(placed_edits(edit, None, dtype))


def test_a_number_is_as_large_as_the_dtype_holds_and_what_does_not_get_there_may_be_larger():
    for dtype, most in LARGEST.items():
        assert most == float(ml_dtypes.finfo(dtype).max)
        for edit in (djinn.Set(-most), djinn.Lerp(most, 0.5), djinn.Scale(LARGEST["float32"])):
            edit._check(dtype)
    djinn.Scale(7e4)._check("float16")  # of small numbers, in float32
    djinn.Project([1e200, 0.0])._check("bfloat16")
    djinn.Add(1e200)._check("float64")
    djinn.Scale(1e200)._check("float64")


def test_a_candidate_is_shown_with_as_many_digits_as_one_reads():
    top = djinn.Top(" paris", 145, 0.9997265092670847, 16.875)
    assert repr(top) == "Top(token=' paris', id=145, probability=0.9997, logit=16.875)"
