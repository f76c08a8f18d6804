"""`selection` against numpy itself, and against torch where it is installed."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn_zmq.errors import SelectionError
from djinn_zmq.wire.edits import (
    Add,
    Index,
    Lerp,
    Patch,
    Pick,
    Project,
    Rest,
    Scale,
    Set,
    Stretch,
    Take,
    Zero,
    selection,
    tensors_in,
)
from djinn_zmq.wire.tensors import inline

try:
    import torch
except ImportError:
    torch = None

SMALL = st.integers(-7, 7)
ANY = SMALL | st.integers(-(2**63), 2**64 - 1)
BOUND = st.none() | ANY
PARTS = (
    st.builds(Pick, SMALL)
    | st.builds(Stretch, BOUND, BOUND, BOUND)
    | st.builds(Take, st.lists(SMALL, max_size=6).map(tuple))
    | st.just(Rest())
)
INDICES = st.lists(PARTS, max_size=5).map(tuple)
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def numpys(index: Index) -> tuple[Any, ...]:
    """The same index in numpy's own notation."""
    written: list[Any] = []
    for part in index:
        if isinstance(part, Pick):
            written.append(part.at)
        elif isinstance(part, Take):
            written.append(np.array(part.at, np.int64))
        elif isinstance(part, Stretch):
            written.append(slice(part.start, part.stop, part.step))
        else:
            written.append(...)
    return tuple(written)


def agrees(index: Index, shape: tuple[int, ...]) -> None:
    """Where *index* is accepted, it selects what numpy selects."""
    array = np.arange(int(np.prod(shape))).reshape(shape)
    try:
        chosen = selection(index, shape)
    except SelectionError:
        return
    expected = array[numpys(index)]
    assert np.array_equal(array[chosen], expected)
    assert np.shape(array[chosen]) == np.shape(expected)
    assert 0 < np.size(expected) <= array.size
    if torch is not None:
        tensor = torch.arange(array.size).reshape(shape)
        assert tuple(tensor[chosen].shape) == np.shape(expected)
        assert np.array_equal(tensor[chosen].numpy(), expected)


@settings(deadline=None, max_examples=200)
@given(INDICES, SHAPES)
def test_what_is_accepted_selects_what_numpy_selects(index: Index, shape: tuple[int, ...]) -> None:
    agrees(index, shape)


def test_dots_anywhere_select_what_numpy_selects_with_them() -> None:
    """Also where they stand for no axis."""
    kinds = (Pick(1), Stretch(None, None, None), Stretch(None, None, -1), Take((1, 0)))
    for count in range(4):
        for parts in itertools.product(kinds, repeat=count):
            for place in range(count + 1):
                agrees((*parts[:place], Rest(), *parts[place:]), (2, 3, 4))


@settings(deadline=None, max_examples=200)
@given(st.tuples(SMALL, SMALL, SMALL))
def test_ints_are_accepted_exactly_where_numpy_accepts_them(at: tuple[int, int, int]) -> None:
    array = np.arange(60).reshape(3, 4, 5)
    index = tuple(map(Pick, at))
    try:
        expected = array[at]
    except IndexError:
        with pytest.raises(SelectionError):
            selection(index, array.shape)
    else:
        assert array[selection(index, array.shape)] == expected


@pytest.mark.parametrize(
    "index, reason",
    [
        ((Pick(2),), "index 2 is out of range on axis 0 of hidden with shape (2, 3, 4): allowed -2 to 1"),
        ((Rest(), Pick(-5)), "index -5 is out of range on axis 2"),
        ((Take((0, 2)),), "index 2 is out of range on axis 0"),
        ((Pick(0),) * 4, "4 axes indexed, hidden has 3: shape (2, 3, 4)"),
        ((Rest(), Rest()), "'...' once"),
        ((Stretch(0, None, 0),), "a slice with step 0 on axis 0"),
        ((Stretch(1, 1, None),), "the slice on axis 0 selects nothing of hidden"),
        ((Stretch(0, 1, -1),), "the slice on axis 0 selects nothing of hidden"),
        ((Take(()),), "an empty list on axis 0"),
        ((Take((0,)), Take((0,))), "one list or reversed slice, got 2"),
        ((Take((0,)), Stretch(None, None, -1)), "one list or reversed slice, got 2"),
        ((Pick(0), Rest(), Take((0,))), "write the int i as i:i+1"),
        ((Take((0,)), Stretch(None, None, None), Pick(0)), "write the int i as i:i+1"),
        ((Stretch(None, None, None), Take((0,)), Rest(), Pick(0)), "write the int i as i:i+1"),
        ((Take((0, 0, 0)),), "a list of 3 positions on axis 0 of hidden with shape (2, 3, 4): at most 2"),
    ],
)  # fmt: skip
def test_a_selection_that_cannot_be_is_refused_by_name(index: Index, reason: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(reason)):
        selection(index, (2, 3, 4))


def test_a_refusal_names_the_array_it_is_about() -> None:
    with pytest.raises(IndexError, match="axis 0 of the source"):
        selection((Pick(9),), (2,), "the source")


def test_a_list_cannot_ask_for_more_than_there_is() -> None:
    with pytest.raises(SelectionError, match="at most 1"):
        selection((Take((0,) * 100_000),), (1, 1000, 4096))


def test_an_axis_without_extent_has_nothing_to_select() -> None:
    for part in (Pick(0), Pick(-1), Take((0,)), Stretch(None, None, None), Stretch(None, None, -1)):
        with pytest.raises(SelectionError):
            selection((part,), (0, 3))


def test_every_value_of_an_edit_is_found() -> None:
    tensors = [inline(np.full(1, number, np.int32)) for number in range(4)]
    edits = (
        Zero(()),
        Add(tensors[0], ()),
        Scale(2.0, ()),
        Set(tensors[1], ()),
        Patch(1, (), ()),
        Project(tensors[2], ()),
        Lerp(tensors[3], 0.5, ()),
    )
    assert list(tensors_in(edits)) == tensors
