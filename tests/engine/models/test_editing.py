"""Edits on a hidden state, each against numpy, and the promises about bits and refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

torch = pytest.importorskip("torch")

from djinn_zmq.client.indexing import index_of
from djinn_zmq.engine.models import editing
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import NAMES, TORCH_DTYPES
from djinn_zmq.errors import EditError, UnknownCheckpoint
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire.tensors import DTYPES, Tensor, inline, view

SHAPE = (2, 5, 8)
DTYPE_NAMES = ["float32", "bfloat16", "float64", "float16"]
by_dtype = pytest.mark.parametrize("dtype", DTYPE_NAMES)

PLACES: list[Any] = [
    ...,
    0,
    -1,
    (1, -2),
    (0, -1, 3),
    (..., 7),
    (..., 2, slice(None)),
    slice(1, None),
    (slice(None), slice(1, 4)),
    (slice(None), slice(None, None, 2), slice(1, None, 3)),
    (0, slice(None, None, -1)),
    (..., slice(6, 1, -2)),
    (1, [0, 3, 1]),
    (..., [-1, 0]),
    ([1, 0], 2),
    (slice(-100, 100), slice(-2, 100)),
]
by_place = pytest.mark.parametrize("at", PLACES, ids=str)


def to_torch(array: np.ndarray) -> torch.Tensor:
    name = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.name
    raw = np.frombuffer(bytearray(array.tobytes()), np.uint8)
    return torch.from_numpy(raw).view(TORCH_DTYPES[name]).reshape(array.shape)


def to_numpy(data: torch.Tensor) -> np.ndarray:
    raw = data.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(DTYPES[NAMES[data.dtype]]).reshape(tuple(data.shape)).copy()


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(DTYPES[dtype])


def awkward(dtype: str) -> np.ndarray:
    """A hidden state with both zeros, infinities, subnormals and NaNs of several payloads."""
    array = random(SHAPE, dtype)
    bits = array.view(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    sign = bits.dtype.type(1) << (8 * bits.dtype.itemsize - 1)
    bits[0, 0] = [0, sign, infinity, infinity | sign, infinity + 1, infinity + 5, infinity | 6, 1]
    bits[1, 4] = bits[0, 0] | sign
    return array


def wide(dtype: str) -> np.dtype:
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def given_values(tensor: Tensor) -> torch.Tensor:
    return to_torch(np.array(view(tensor, ())))


def apply(hidden: np.ndarray, *edits: wire.Edit, sources: dict[int, np.ndarray] | None = None):
    """What the *edits* make of *hidden*, which stays as it is."""

    def source(number: int) -> torch.Tensor:
        if number not in (sources or {}):
            raise UnknownCheckpoint(f"checkpoint {number:x} does not exist")
        return to_torch(sources[number])

    return to_numpy(made_on(to_torch(hidden), edits, source))


def made_on(hidden: torch.Tensor, edits: tuple[wire.Edit, ...], source: editing.Source):
    """*hidden* with the edits made on it, as a run does."""
    return editing.carry_out(editing.prepared(hidden, edits, given_values, source), hidden)


def assert_same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.tobytes() == other.tobytes()


def add(value: Any, at: Any = ...) -> wire.Add:
    return wire.Add(inline(np.asarray(value)), index_of(at))


def set_(value: Any, at: Any = ...) -> wire.Set:
    return wire.Set(inline(np.asarray(value)), index_of(at))


def lerp(value: Any, weight: float, at: Any = ...) -> wire.Lerp:
    return wire.Lerp(inline(np.asarray(value)), weight, index_of(at))


def project(direction: Any, at: Any = ...) -> wire.Project:
    return wire.Project(inline(np.asarray(direction)), index_of(at))


def patch(source: int, at: Any = ..., source_at: Any = None) -> wire.Patch:
    return wire.Patch(source, index_of(at), index_of(at if source_at is None else source_at))


def scale(factor: float, at: Any = ...) -> wire.Scale:
    return wire.Scale(factor, index_of(at))


def zero(at: Any = ...) -> wire.Zero:
    return wire.Zero(index_of(at))


# ---- each edit against numpy


@by_dtype
@by_place
def test_each_edit_does_what_numpy_does_at_the_same_place(dtype: str, at: Any) -> None:
    hidden, other = random(SHAPE, dtype), random(SHAPE, dtype, seed=4)
    exact = wide(dtype)
    old = hidden[at].astype(exact)
    value = random(np.shape(old), seed=5).astype(exact)
    expected = {
        "add": (add(value, at), old + value),
        "set": (set_(value, at), value),
        "scale": (scale(-1.7, at), old * exact.type(-1.7)),
        "zero": (zero(at), np.zeros_like(old)),
        "lerp": (lerp(value, 0.7, at), old + exact.type(0.7) * (value - old)),
        "patch": (patch(9, at), other[at]),
    }
    for edit, part in expected.values():
        whole = hidden.copy()
        whole[at] = np.asarray(part).astype(hidden.dtype)
        assert_same_bits(apply(hidden, edit, sources={9: other}), whole)


@by_dtype
@pytest.mark.parametrize("value_dtype", DTYPE_NAMES)
def test_values_of_any_float_dtype_fit_a_hidden_state_of_any(dtype: str, value_dtype: str) -> None:
    hidden, value = random(SHAPE, dtype), random((8,), value_dtype, seed=5)
    exact = wide(dtype)
    expected = (hidden.astype(exact) + value.astype(exact)).astype(hidden.dtype)
    assert_same_bits(apply(hidden, add(value)), expected)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (5, 1), (5, 8), (2, 1, 1), (1, 5, 8), (2, 5, 8)])
def test_values_are_broadcast_as_numpy_does(shape: tuple[int, ...]) -> None:
    hidden, value = random(SHAPE), random(shape, seed=5).reshape(shape)
    assert_same_bits(apply(hidden, add(value)), hidden + value)
    assert_same_bits(apply(hidden, set_(value)), np.broadcast_to(value, SHAPE))
    half = np.float32(0.25)
    assert_same_bits(apply(hidden, lerp(value, 0.25)), hidden + half * (value - hidden))


def test_a_sum_is_rounded_once() -> None:
    hidden = np.full(SHAPE, 256.0, DTYPES["bfloat16"])  # whose neighbours are 2 away
    up = apply(hidden, add(np.float32(1.001)))
    assert (up == 258).all()  # rounded to bfloat16 first, 1.001 is 1, and 257 goes to even: 256
    assert (apply(hidden, add(np.float32(1.0))) == 256).all()


def test_lerp_with_weight_one_sets_the_value() -> None:
    hidden = np.full(SHAPE, 1e8, np.float32)
    value = random(SHAPE, seed=5)
    assert_same_bits(apply(hidden, lerp(value, 1.0)), value)


@by_dtype
def test_a_whole_hidden_state_and_a_row_of_it_are_edited_to_the_same_bits(dtype: str) -> None:
    hidden = random((2, 5, 37), dtype)
    value, direction = random((37,), seed=5), random((37,), seed=6)
    for whole, part in [
        (add(value), add(value, (1, 2))),
        (scale(0.3), scale(0.3, (1, 2))),
        (lerp(value, 0.3), lerp(value, 0.3, (1, 2))),
    ]:
        assert_same_bits(apply(hidden, whole)[1, 2], apply(hidden, part)[1, 2])
    one, other = apply(hidden, project(direction)), apply(hidden, project(direction, (1, 2)))
    tolerance = {"float64": 1e-14, "float32": 1e-6}.get(dtype, 2e-2)
    np.testing.assert_allclose(
        one[1, 2].astype(float), other[1, 2].astype(float), atol=tolerance, rtol=tolerance
    )


# ---- projections


@by_dtype
@pytest.mark.parametrize("at", [..., 0, (1, -2), (0, [2, 0]), (..., slice(2, 6))], ids=str)
def test_project_removes_the_direction_and_nothing_else(dtype: str, at: Any) -> None:
    hidden = random(SHAPE, dtype)
    old = hidden[at].astype(np.float64)
    direction = random((old.shape[-1],), seed=6).astype(np.float64) * 40
    unit = direction / np.linalg.norm(direction)
    got = apply(hidden, project(direction, at))
    tolerance = {"float64": 1e-14, "float32": 1e-6, "float16": 4e-3}.get(dtype, 3e-2)
    new = got[at].astype(np.float64)
    np.testing.assert_allclose(new @ unit, 0, atol=tolerance)
    np.testing.assert_allclose(new, old - (old @ unit)[..., None] * unit, atol=tolerance)
    untouched = np.ones(SHAPE, bool)
    untouched[at] = False
    assert_same_bits(got[untouched], hidden[untouched])


@pytest.mark.parametrize("length", [1e-300, 1e-40, 1e-25, 1.0, 1e25, 1e40, 1e300])
def test_the_length_of_a_direction_does_not_matter(length: float) -> None:
    hidden = random(SHAPE)
    direction = random((8,), "float64", seed=6)
    expected = apply(hidden, project(direction))
    np.testing.assert_allclose(apply(hidden, project(direction * length)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (np.zeros(8), "a direction of length zero"),
        (np.full(8, -0.0), "a direction of length zero"),
        (np.array([np.nan] + [1.0] * 7), "a direction that is not finite"),
        (np.array([np.inf] + [1.0] * 7), "a direction that is not finite"),
        (np.ones(7), r"a direction of shape \(7,\).*needs \(8,\)"),
        (np.ones((1, 8)), r"a direction of shape \(1, 8\).*needs \(8,\)"),
        (np.float64(1.0), r"a direction of shape \(\).*needs \(8,\)"),
    ],
)
def test_a_direction_that_is_none_is_refused(direction: np.ndarray, reason: str) -> None:
    with pytest.raises(EditError, match=rf"edit 0 \(Project\): {reason}"):
        apply(random(SHAPE), project(direction))


def test_a_direction_for_a_single_number_is_refused() -> None:
    with pytest.raises(EditError, match=r"edit 0 \(Project\): `at` chooses a single number"):
        apply(random(SHAPE), project(np.ones(1), (0, 1, 2)))


# ---- edits that change nothing


@by_dtype
@by_place
def test_an_edit_that_changes_nothing_changes_no_bit(dtype: str, at: Any) -> None:
    hidden = awkward(dtype)
    own = np.array(hidden[at])
    for edit in (
        add(np.zeros(np.shape(own), hidden.dtype), at),
        add(np.float64(-0.0), at),
        scale(1.0, at),
        lerp(np.float32(7.0), 0.0, at),
        lerp(np.float32(7.0), -0.0, at),
        set_(own, at),
        patch(9, at),
    ):
        assert_same_bits(apply(hidden, edit, sources={9: hidden}), hidden)


@by_dtype
def test_where_the_addend_is_zero_the_bits_stay(dtype: str) -> None:
    hidden = awkward(dtype)
    addend = np.zeros(8, np.float32)
    addend[0] = 1.5
    got = apply(hidden, add(addend))
    assert_same_bits(got[..., 1:], hidden[..., 1:])
    assert (got[..., 0] != hidden[..., 0]).all()


@by_dtype
def test_what_is_not_chosen_keeps_its_bits(dtype: str) -> None:
    hidden = awkward(dtype)
    for edit in (
        add(np.float32(1.0), 1),
        set_(np.float32(1.0), 1),
        scale(2.0, 1),
        zero(1),
        lerp(np.float32(1.0), 0.5, 1),
        project(np.ones(8), 1),
        patch(9, 1, 0),
    ):
        assert_same_bits(apply(hidden, edit, sources={9: hidden})[0], hidden[0])


def test_set_puts_every_bit_of_the_value_there() -> None:
    hidden, value = random(SHAPE), awkward("float32")
    assert_same_bits(apply(hidden, set_(value)), value)


def test_zero_is_plus_zero_everywhere() -> None:
    assert_same_bits(apply(awkward("bfloat16"), zero()), np.zeros(SHAPE, DTYPES["bfloat16"]))


# ---- patches


def test_a_patch_can_come_from_another_place_of_a_longer_prompt() -> None:
    hidden, source = random(SHAPE), random((1, 9, 8), seed=4)
    got = apply(hidden, patch(9, (1, slice(0, 3)), (0, slice(6, 9))), sources={9: source})
    assert_same_bits(got[1, :3], source[0, 6:])
    assert_same_bits(got[0], hidden[0])


def test_a_patch_of_a_hidden_state_from_itself_moves_what_it_was_before() -> None:
    hidden = random(SHAPE)
    edits = (zero(0), patch(9, 1, 0))
    got = apply(hidden, *edits, sources={9: hidden})
    assert_same_bits(got[1], hidden[0])
    assert not got[0].any()


def test_a_patch_is_not_changed_by_what_comes_after_it() -> None:
    hidden, source = random(SHAPE), random(SHAPE, seed=4)
    kept = source.copy()
    apply(hidden, patch(9), scale(3.0), sources={9: source})
    assert_same_bits(source, kept)


def test_a_patch_of_another_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(EditError, match=r"edit 0 \(Patch\).*\(2, 3, 8\).*\(2, 5, 8\)"):
        apply(random(SHAPE), patch(9), sources={9: random((2, 3, 8))})


def test_a_patch_of_another_dtype_is_refused_with_both_names() -> None:
    with pytest.raises(EditError, match="the source is bfloat16, the checkpoint float32"):
        apply(random(SHAPE), patch(9), sources={9: random(SHAPE, "bfloat16")})


def test_a_patch_from_outside_its_source_is_refused_with_its_shape() -> None:
    with pytest.raises(EditError, match=r"index 5 is out of range on axis 1 of the source.*-5 to"):
        apply(random(SHAPE), patch(9, (0, 0), (0, 5)), sources={9: random(SHAPE)})


def test_a_patch_from_a_checkpoint_that_is_not_there_says_so() -> None:
    with pytest.raises(UnknownCheckpoint):
        apply(random(SHAPE), patch(9))


# ---- several edits


def test_edits_are_made_in_the_order_given() -> None:
    hidden = random(SHAPE)
    added_first = apply(hidden, add(np.float32(1.0)), scale(2.0))
    scaled_first = apply(hidden, scale(2.0), add(np.float32(1.0)))
    assert_same_bits(added_first, (hidden + np.float32(1)) * np.float32(2))
    assert_same_bits(scaled_first, hidden * np.float32(2) + np.float32(1))


def test_no_edits_leave_all_as_it_is() -> None:
    assert_same_bits(apply(awkward("float32")), awkward("float32"))


BAD = {
    "a value of another shape": (add(np.ones(7, np.float32)), r"shape \(7,\) does not fit"),
    "a value of more axes": (set_(np.ones((1, 2, 5, 8))), r"\(1, 2, 5, 8\) does not fit"),
    "a value that is larger": (add(np.ones((2, 8)), (0, 0)), r"\(2, 8\) does not fit the part"),
    "an empty value": (lerp(np.ones(0), 0.5), r"shape \(0,\) does not fit"),
    "whole numbers": (add(np.arange(8)), "values of dtype int64: floats are needed"),
    "truth values": (set_(np.ones(8, bool)), "values of dtype bool: floats are needed"),
    "a whole direction": (project(np.arange(8, dtype=np.int32)), "values of dtype int32"),
    "a batch that is not there": (zero(2), "index 2 is out of range on axis 0"),
    "a position that is not there": (zero((0, -6)), "index -6 is out of range on axis 1"),
    "a listed channel that is not there": (zero((..., [0, 8])), "index 8 is out of range"),
    "too many axes": (scale(2.0, (0, 0, 0, 0)), "4 axes indexed, hidden has 3"),
    "a slice of nothing": (zero((0, slice(3, 3))), "selects nothing of hidden"),
    "a position named twice": (zero((0, [1, -4])), r"position 1 of axis 1 is chosen twice"),
    "two lists": (zero(([0], [1])), "one list"),
}


@pytest.mark.parametrize(("edit", "reason"), BAD.values(), ids=BAD)
def test_an_edit_that_does_not_fit_is_refused_by_its_place(edit: wire.Edit, reason: str) -> None:
    hidden = to_torch(random(SHAPE))
    before = hidden.clone()
    name = type(edit).__name__
    with pytest.raises(EditError, match=rf"edit 2 \({name}\): .*{reason}"):
        made_on(hidden, (zero(), scale(3.0), edit), lambda _: hidden)
    assert same_bits(hidden, before), "no edit is made before all are checked"


def test_a_refused_patch_leaves_the_edits_before_it_unmade() -> None:
    hidden = to_torch(random(SHAPE))
    before = hidden.clone()
    for source in (hidden.double(), hidden[:, :2]):
        with pytest.raises(EditError, match=r"edit 1 \(Patch\)"):
            made_on(hidden, (zero(), patch(9)), lambda _, source=source: source)
        assert same_bits(hidden, before)


# ---- whatever comes


def _index_parts(extent: int) -> st.SearchStrategy[Any]:
    ends = st.none() | st.integers(-extent - 2, extent + 2)
    steps = st.none() | st.integers(-3, 3).filter(bool)
    return st.integers(-extent, extent - 1) | st.builds(slice, ends, ends, steps)


_places = st.tuples(*map(_index_parts, SHAPE)) | st.tuples(*map(_index_parts, SHAPE[:2]))
_floats32 = npst.arrays(np.float32, (8,), elements=st.floats(width=32, allow_nan=False))


@settings(max_examples=150, deadline=None)
@given(at=_places, value=st.floats(-1e6, 1e6, width=32))
def test_any_place_that_is_taken_is_the_one_numpy_takes(at: Any, value: float) -> None:
    hidden = random(SHAPE)
    expected = hidden.copy()
    expected[at] += np.float32(value)
    try:
        got = apply(hidden, add(np.float32(value), at))
    except EditError:
        reversed_slices = sum(isinstance(one, slice) and (one.step or 1) < 0 for one in at)
        assert hidden[at].size == 0 or reversed_slices
        return
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=100, deadline=None)
@given(bits=npst.arrays(np.uint16, SHAPE), row=_floats32, factor=st.floats(-10, 10, width=32))
def test_any_bits_of_bfloat16_are_edited_as_numpy_does(
    bits: np.ndarray, row: np.ndarray, factor: float
) -> None:
    hidden = bits.view(DTYPES["bfloat16"])
    old = hidden.astype(np.float32)
    with np.errstate(all="ignore"):
        added = np.where(row == 0, hidden, (old + row).astype(hidden.dtype))
        scaled = hidden if factor == 1 else (old * np.float32(factor)).astype(hidden.dtype)
        for edit, expected in ((add(row), added), (scale(factor), scaled)):
            got = apply(hidden, edit).astype(np.float32)
            np.testing.assert_array_equal(got, expected.astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(direction=_floats32.filter(lambda one: np.abs(one).max() > 0))
def test_any_direction_is_gone_after_it_was_projected_out(direction: np.ndarray) -> None:
    hidden = random(SHAPE, "float64")
    try:
        got = apply(hidden, project(direction))
    except EditError:
        assert not np.isfinite(direction).all()
        return
    unit = direction.astype(np.float64) / np.abs(direction).max()
    unit /= np.linalg.norm(unit)
    np.testing.assert_allclose(got @ unit, 0, atol=1e-12)
