"""Checkpoints in files: safetensors, written whole or not at all, read without trust.

    u64 length of the header │ header: JSON, padded with spaces │ data
    {"__metadata__": {text: text}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}}

Source: the format section of safetensors' README. A checkpoint's file holds `hidden` (batch,
positions, hidden_size) and `ids` int64 (batch, positions); its metadata says of which model they are.
"""

import contextlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.errors import BadFile
from djinn_zmq.wire.messages import ModelInfo
from djinn_zmq.wire.tensors import DTYPES, over

FORMAT = "djinn-checkpoint-1"
LENGTH = struct.Struct("<Q")
HEADER_LIMIT = 1 << 20  # bytes; ours has a few hundred
SUFFIX = ".safetensors"
SCRATCH = ".tmp"
NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {stored: name for name, stored in NAMES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in a file: its bytes are [begin, begin + nbytes)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint's file says of it."""

    path: Path
    nbytes: int  # of the file
    metadata: dict[str, str]
    hidden: Piece
    ids: Piece

    @property
    def layer(self) -> int:
        return int(self.metadata["layer"])


def path_of(folder: Path, number: int) -> Path:
    """Where checkpoint *number* is in a state directory."""
    return folder / f"{number:016x}{SUFFIX}"


def facts_of(info: ModelInfo) -> dict[str, str]:
    """What a checkpoint's file says of its model."""
    return {
        "model": info.name,
        "architecture": info.architecture,
        "model_shape": f"{info.num_layers} layers, {info.hidden_size} wide, {info.vocab_size} tokens",
        "model_dtype": info.dtype,
    }


def differences(saved: Saved, info: ModelInfo) -> list[str]:
    """In what the model of *saved* is another than *info*."""
    return [
        f'{name} "{saved.metadata.get(name)}", not "{fact}"'
        for name, fact in facts_of(info).items()
        if saved.metadata.get(name) != fact
    ]


def check_model(saved: Saved, info: ModelInfo) -> None:
    """Raises BadFile where *saved* is of another model than *info*, naming what differs."""
    if found := differences(saved, info):
        raise BadFile(f"{saved.path} is of another model: {'; '.join(found)}")


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Write *arrays* (C-contiguous, of wire dtypes) to *path*; returns the file's bytes.

    The file appears whole, and on the disk, or not at all; mode 0600. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}{SCRATCH}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(fd, memoryview(LENGTH.pack(len(text)) + text))
            for array in arrays.values():
                _write_all(fd, _raw(array))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    _sync_folder(path.parent)
    return LENGTH.size + len(text) + offset


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_all(fd: int, rest: memoryview) -> None:
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when the folder is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> Saved:
    """What the file *path* holds, every word of it checked. Raises BadFile, naming the fault."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH.size)
            length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
            if not 2 <= length <= min(HEADER_LIMIT, size):
                raise BadFile(f"{path} is no safetensors file")
            header = json.loads(file.read(length))
    except OSError as exc:
        raise BadFile(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise BadFile(f"{path} is no safetensors file: {exc}") from exc
    data = LENGTH.size + length
    try:
        metadata = header.pop("__metadata__")
        pieces = {name: _piece(entry, data, size) for name, entry in header.items()}
        saved = Saved(path, size, dict(metadata), pieces["hidden"], pieces["ids"])
        layer, stored = saved.layer, saved.metadata["format"]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise BadFile(f"{path} is no checkpoint of Djinn's: {exc!r}") from exc
    if stored != FORMAT or layer < 0:
        raise BadFile(f'{path} is of format "{stored}", layer {layer}: "{FORMAT}" is needed')
    ids, hidden = saved.ids, saved.hidden
    if ids.dtype != "int64" or len(hidden.shape) != 3 or hidden.shape[:2] != ids.shape:
        raise BadFile(f"{path}: ids {ids.dtype} {ids.shape} do not fit hidden {hidden.shape}")
    if ids.nbytes + hidden.nbytes + data != size:
        raise BadFile(f"{path} has {size} bytes, its tensors take {ids.nbytes + hidden.nbytes}")
    return saved


def _piece(entry: Any, data: int, size: int) -> Piece:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, offsets {begin} to {end}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes or data + end > size:
        raise ValueError(f"{dtype} {shape} takes {nbytes} bytes, its offsets are {begin} to {end}")
    return Piece(dtype, shape, data + begin, nbytes)


def array_of(saved: Saved, piece: Piece) -> np.ndarray:
    """A read-only array over the file's pages. Raises BadFile where it has shrunk or gone."""
    try:
        with saved.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as exc:
        raise BadFile(f"{saved.path} cannot be read: {exc}") from exc
    if len(mapped) != saved.nbytes:
        raise BadFile(f"{saved.path} has changed: {len(mapped)} bytes, not {saved.nbytes}")
    return over(memoryview(mapped)[piece.begin :], piece.dtype, piece.shape)


def read_into(saved: Saved, piece: Piece, target: memoryview) -> None:
    """Copy a tensor's bytes into *target*, as many. Raises BadFile where the file has fewer."""
    try:
        fd = os.open(saved.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise BadFile(f"{saved.path} cannot be read: {exc.strerror}") from exc
    try:
        place = 0
        while place < piece.nbytes:
            count = os.preadv(fd, [target[place : piece.nbytes]], piece.begin + place)
            if not count:
                raise BadFile(f"{saved.path} ends after {piece.begin + place} bytes")
            place += count
    finally:
        os.close(fd)
