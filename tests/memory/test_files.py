"""Checkpoints' files: what safetensors itself reads and writes, and nothing that lies."""

import bisect
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn_zmq.errors import BadFile
from djinn_zmq.memory import files

HIDDEN = np.arange(2 * 5 * 8, dtype=np.float32).reshape(2, 5, 8).astype(ml_dtypes.bfloat16)
IDS = np.arange(10, dtype=np.int64).reshape(2, 5)
FACTS = {"format": files.FORMAT, "layer": "2"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    where = tmp_path / "one.safetensors"
    assert files.write(where, {"hidden": HIDDEN, "ids": IDS}, FACTS) == where.stat().st_size
    return where


def test_what_is_written_is_read_with_the_same_bits_and_by_safetensors_too(path: Path) -> None:
    saved = files.read(path)
    assert saved.layer == 2 and saved.hidden.shape == (2, 5, 8)
    assert files.load(saved, saved.hidden).tobytes() == HIDDEN.tobytes()
    target = bytearray(HIDDEN.nbytes)
    files.read_into(saved, saved.hidden, memoryview(target))
    assert bytes(target) == HIDDEN.tobytes()
    loaded = pytest.importorskip("safetensors.torch").load_file(path)
    assert loaded["hidden"].float().numpy().tolist() == HIDDEN.astype(np.float32).tolist()
    assert loaded["ids"].numpy().tolist() == IDS.tolist()


def test_a_file_that_safetensors_wrote_anew_is_read_and_one_of_its_own_has_no_checksums(
    path: Path, tmp_path: Path
) -> None:
    theirs = pytest.importorskip("safetensors.torch")
    tensors, where = theirs.load_file(path), tmp_path / "theirs.safetensors"
    theirs.save_file(tensors, where, metadata=files.read(path).metadata)
    assert where.read_bytes() != path.read_bytes()  # in another order
    saved = files.read(where)
    assert files.load(saved, saved.ids).tolist() == IDS.tolist()
    theirs.save_file(tensors, where, metadata=FACTS)
    with pytest.raises(BadFile, match="has no checksums"):
        files.read(where)


@pytest.mark.parametrize(
    "fact",
    [{"owner": 5}, {"owner": None}, {"model": ["tiny"]}, {"layer": 2}, {"layer": "9" * 5000}],
)
def test_metadata_that_are_no_text_or_no_layer_are_refused(
    tmp_path: Path, fact: dict[str, Any]
) -> None:
    where = tmp_path / "one.safetensors"
    files.write(where, {"hidden": HIDDEN, "ids": IDS}, {**FACTS, **fact})
    with pytest.raises(BadFile, match="is no text|says no layer"):
        files.read(where)


def test_a_layer_that_is_no_number_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "one.safetensors"
    for layer in ("two", "-1", ""):
        files.write(where, {"hidden": HIDDEN, "ids": IDS}, {**FACTS, "layer": layer})
        with pytest.raises(BadFile, match="says no layer"):
            files.read(where)


def test_a_word_of_a_header_that_was_changed_is_found(path: Path) -> None:
    """As one that says another model, which every other check would pass."""
    files.write(path, {"hidden": HIDDEN, "ids": IDS}, {**FACTS, "model": "tiny"})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"model": "tiny"', b'"model": "huge"'))
    with pytest.raises(BadFile, match=r"is damaged: its header has the checksum \w{8}, not"):
        files.read(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(BadFile, match=f"has {len(raw) + 1} bytes, its header and tensors take"):
        files.read(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for where, why in (
        (tmp_path / "none", "cannot be read: No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(BadFile, match=f"{where} .*{why}"):
            files.read(where)


def test_checksums_are_those_that_the_protocol_says(tmp_path: Path) -> None:
    where = tmp_path / "large.safetensors"
    large = np.arange(3 * files.SUMMED // 4 + 7, dtype=np.float32).reshape(1, 1, -1)
    ids = IDS[:1, :1]
    files.write(where, {"hidden": large, "ids": ids}, FACTS)
    facts = dict(files.read(where).metadata)
    for name, array in (("hidden", large), ("ids", ids)):
        data = array.tobytes()
        parts = [data[at : at + 256 * 1024] for at in range(0, len(data), 256 * 1024)]
        assert facts[f"crc32.{name}"] == "".join(f"{zlib.crc32(part):08x}" for part in parts)
    said = facts.pop("crc32")
    tensors = [["hidden", "F32", list(large.shape)], ["ids", "I64", [1, 1]]]
    text = json.dumps([facts, tensors], sort_keys=True, separators=(",", ":"))
    assert said == f"{zlib.crc32(text.encode()):08x}"


@pytest.mark.parametrize("name", ["hidden", "ids"])
def test_a_changed_bit_of_a_tensor_is_found_by_every_reader_and_named(
    tmp_path: Path, name: str
) -> None:
    """In its last byte, several checksums on: the parts before are good, and a row of them is read."""
    arrays = {
        "hidden": np.zeros((1, 3, files.SUMMED // 4), np.float32),
        "ids": np.zeros((1, 3), np.int64),
    }
    where = tmp_path / "one.safetensors"
    files.write(where, arrays, FACTS)
    saved = files.read(where)
    piece = getattr(saved, name)
    with where.open("r+b") as file:
        file.seek(piece.begin + piece.nbytes - 1)
        file.write(b"\1")
    text = (
        rf"{where} is damaged: bytes \d+ to {piece.nbytes} of {name} have the checksum \w{{8}}, not"
    )
    with pytest.raises(BadFile, match=text):
        files.load(saved, piece)
    target = memoryview(bytearray(piece.nbytes))
    good = min(files.SUMMED, piece.nbytes - 1) * (name == "hidden")
    files.read_between(saved, piece, target, 0, good)
    with pytest.raises(BadFile, match=text):
        files.read_between(saved, piece, target, piece.nbytes - 1, piece.nbytes)


def test_a_write_that_fails_leaves_neither_the_file_nor_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "one.safetensors", {"hidden": HIDDEN, "ids": IDS}, FACTS)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_with_any_byte_changed_holds_what_was_written_or_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("harm") / "one.safetensors"
    files.write(where, {"hidden": HIDDEN, "ids": IDS}, FACTS)
    raw = bytearray(where.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    where.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        saved = files.read(where)
        hidden, ids = files.load(saved, saved.hidden), files.load(saved, saved.ids)
    except BadFile as exc:
        assert str(where) in str(exc)
    else:
        assert (saved.layer, saved.metadata["format"]) == (2, files.FORMAT)
        assert hidden.tobytes() == HIDDEN.tobytes() and ids.tobytes() == IDS.tobytes()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2, 5, 8], "data_offsets": [0, 1 << 60]},
        {"dtype": "BF16", "shape": [2, 5, -8], "data_offsets": [0, 160]},
        {"dtype": "BF16", "shape": [2, 5, 8.0], "data_offsets": [0, 160]},
        {"dtype": "BF16", "shape": [1 << 40, 1 << 40, 8], "data_offsets": [0, 160]},
        {"dtype": "BF16", "shape": [2, 5, 8], "data_offsets": [-80, 80]},
        {"dtype": "BF16", "shape": [80], "data_offsets": [0, 160]},
        {"dtype": "C64", "shape": [2, 5, 8], "data_offsets": [0, 160]},
        {"shape": [2, 5, 8]},
        None,
    ],
)
def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path: Path, entry: object) -> None:
    ids = {"dtype": "I64", "shape": [2, 5], "data_offsets": [160, 240]}
    facts = {**FACTS, "crc32.hidden": "0" * 8, "crc32.ids": "0" * 8}
    tensors = {"hidden": entry, "ids": ids}
    facts["crc32"] = files._sum_of_header(facts, tensors)
    text = json.dumps({"__metadata__": facts, **tensors}).encode()
    where = tmp_path / "lies.safetensors"
    where.write_bytes(files.LENGTH.pack(len(text)) + text + bytes(240))
    with pytest.raises(BadFile, match=str(where)) as refused:
        files.read(where)
    assert "hidden" in str(refused.value) and "Error" not in str(refused.value)


def test_a_file_that_changes_after_it_was_looked_at_is_refused(path: Path) -> None:
    saved = files.read(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadFile, match="is cut short: it ends at byte"):
        files.load(saved, saved.ids)


def unreadable(depth: int) -> bool:
    try:
        json.loads("[" * depth + "]" * depth if depth else "0")
    except RecursionError:
        return True
    return False


def test_a_header_that_is_nested_as_deep_as_can_just_be_read_is_refused_like_any_other(
    tmp_path: Path,
) -> None:
    where = tmp_path / "deep.safetensors"
    depths = range(sys.getrecursionlimit())
    deepest = bisect.bisect(depths, False, key=unreadable) - 1
    for depth in range(deepest - 20, deepest + 1):  # `read` has some of the stack itself
        said = {"format": files.FORMAT, files.SUM: "0" * files.SUM_DIGITS, "deep": "HERE"}
        nested = "[" * depth + "]" * depth
        text = json.dumps({"__metadata__": said}).replace('"HERE"', nested).encode()
        where.write_bytes(files.LENGTH.pack(len(text)) + text)
        with pytest.raises(BadFile):
            files.read(where)
