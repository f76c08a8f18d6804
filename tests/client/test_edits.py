"""Edits as they are made by hand: what they say of themselves, and what is none."""

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client.edits import placed_edits
from djinn_zmq.errors import EditError, RequestError


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


@pytest.mark.parametrize("given", [djinn.Zero, [djinn.Scale], None, [3]])
def test_what_is_no_edit_is_refused_before_anything_travels(given):
    with pytest.raises(RequestError, match="is no edit"):
        list(placed_edits(given, None))


def test_a_candidate_is_shown_with_as_many_digits_as_one_reads():
    top = djinn.Top(" paris", 145, 0.9997265092670847, 16.875)
    assert repr(top) == "Top(token=' paris', id=145, probability=0.9997, logit=16.875)"
