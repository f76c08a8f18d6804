"""What is typed to the debugger means something, or is refused in one line."""

import io

import numpy as np
import pytest

from djinn_zmq.cli.debug import reading
from djinn_zmq.cli.debug.reading import Mistyped
from djinn_zmq.errors import RequestError


@pytest.mark.parametrize(
    "typed, stop",
    [
        ("2", "2"),
        ("layers.1.mlp", "'layers.1.mlp'"),
        ("2 if nan", "Break(2, when=HasNaN())"),
        ("if norm > 50", 'Break(when=Norm(">", 50))'),
        (
            ".mlp if norm>=1e2 and token is or step 3",
            "Break('.mlp', when=((Norm(\">=\", 100) & Token('is')) | Step(3)))",
        ),
        ('norm if token "the"', "Break('norm', when=Token('the'))"),
        ("0 if token 17", "Break(0, when=Token(17))"),
    ],
)
def test_a_breakpoint_is_a_place_a_condition_or_both(typed, stop):
    assert repr(reading.stop(typed)) == stop


@pytest.mark.parametrize(
    "typed, at",
    [
        ("", ...),
        ("[0, -1]", (0, -1)),
        ("[..., 3:5]", (..., slice(3, 5))),
        ("[:,::2]", (slice(None), slice(None, None, 2))),
    ],
)
def test_an_index_is_numpys_own(typed, at):
    assert reading.index(typed) == at


def test_an_edit_has_a_value_and_an_index(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4, dtype=np.float32))
    assert reading.edit("add 1,2.5 [0]", None).array.tolist() == [1, 2.5]
    assert reading.edit(f"add {tmp_path / 'v.npy'} [0, -1]", None).array.tolist() == [0, 1, 2, 3]
    assert reading.edit("lerp 0 0.25 [0, 1]", None).weight == 0.25
    assert repr(reading.edit("skip layers.2", None)) == repr(reading.Skip("layers.2"))


@pytest.mark.parametrize("harm", ["empty", "half an archive", "larger than memory"])
def test_a_file_without_an_array_is_refused_by_name(tmp_path, harm):
    path, held = tmp_path / "v.npy", io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**14,)}
    np.lib.format.write_array_header_1_0(held, shape)
    harms = {
        "empty": b"",
        "half an archive": b"PK\x03\x04xx",
        "larger than memory": held.getvalue(),
    }
    path.write_bytes(harms[harm])
    with pytest.raises(Mistyped, match="v.npy cannot be read as an array"):
        reading.edit(f"add {path}", None)


@pytest.mark.parametrize(
    "read, typed",
    [
        (reading.stop, "2 3"),
        (reading.stop, "2 if"),
        (reading.stop, "if norm > much"),
        (reading.stop, "if hot"),
        (reading.condition, "nan and"),
        (reading.index, "[]"),
        (reading.index, "[0,]"),
        (reading.index, "[a]"),
        (reading.index, "[1:2:3:4]"),
        (reading.index, f"[{'9' * 5000}]"),  # more digits than Python reads
        (reading.index, f"[{'9' * 5000}:]"),
        (reading.stop, "9" * 5000),
        (reading.stop, f"if token {'9' * 5000}"),
        (reading.value, "~nobody-of-this-name/v.npy"),
        (reading.value, "1,x"),
        (reading.value, "missing.npy"),
        (lambda text: reading.edit(text, None), "explode [0]"),
        (lambda text: reading.edit(text, None), "scale"),
        (lambda text: reading.edit(text, None), "scale x"),
        (lambda text: reading.edit(text, None), "zero 3 [0]"),
        (lambda text: reading.edit(text, None), "skip 1 [0]"),
        (lambda text: reading.edit(text, None), "add 1 [0] [1]"),
        (lambda text: reading.edit(text, None), "patch 3 [0]"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(read, typed):
    with pytest.raises((Mistyped, RequestError)) as refused:
        read(typed)
    assert "\n" not in str(refused.value)
