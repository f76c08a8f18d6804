"""Checkpoints in files: safetensors, written whole or not at all, read without trust.

    u64 length of the header │ header: JSON, padded with spaces │ data
    {"__metadata__": {text: text}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}}

Source: the format section of safetensors' README. A checkpoint's file holds `hidden` (batch,
positions, hidden_size) and `ids` int64 (batch, positions); its metadata says of which model they are.

What is read is what was written, or BadFile. The metadata has a CRC-32 of every 256 KiB of a tensor, so that
a row is checked without reading the rest, and one of what the header says, those of the tensors included. It
finds what disks, copies and editors do to a file, not who means harm: he would write it anew. Against
zlib.crc32 (2 to 4 GB/s, without the interpreter's lock) a cryptographic one costs two to four times as much and
finds no more of that; zlib-ng's gives the same numbers at 12 GB/s. Each is taken where the bytes are at hand anyway.
"""

import contextlib
import errno
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from djinn_zmq.errors import BadFile
from djinn_zmq.settings import KIB
from djinn_zmq.wire.messages import ModelInfo
from djinn_zmq.wire.tensors import DTYPES, over

FORMAT = "djinn-checkpoint-2"
LENGTH = struct.Struct("<Q")
HEADER_LIMIT = 1 << 20  # bytes; ours has a few hundred
SUFFIX = ".safetensors"
SCRATCH = ".tmp"
LAYER_DIGITS = 9  # the interpreter makes no number of thousands of them
SUM = "crc32"  # in the metadata: of the header; SUM.NAME: of a tensor, one after the other
SUM_DIGITS = 8  # hexadecimal
SUMMED = 256 * KIB  # bytes of a tensor that have one checksum
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
KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
MARK = "mark"  # in the metadata of a state directory's file: no other has the same
NEEDS = "needs"  # likewise: what it takes beside the file to go on, where that is not enough
_DTYPES = {stored: name for name, stored in NAMES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor in a file: its bytes are [begin, begin + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    sums: str  # SUM_DIGITS for each SUMMED bytes


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
    tensors: dict[str, Any] = {}
    sums: dict[str, str] = {}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        tensors[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        sums[name] = "0" * SUM_DIGITS * -(-array.nbytes // SUMMED)
        offset = end
    begin = len(_head(tensors, metadata, sums))  # it has its final length already
    if begin > HEADER_LIMIT:
        raise OSError(errno.EFBIG, f"{offset} bytes are too many for one file")
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}{SCRATCH}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            place = begin
            for name, array in arrays.items():
                sums[name] = _write_summed(fd, _raw(array), place)
                place += array.nbytes
            _write_all(fd, memoryview(_head(tensors, metadata, sums)), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    _sync_folder(path.parent)
    return begin + offset


def _head(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], sums: Mapping[str, str]
) -> bytes:
    """All that is in front of the data."""
    said = {**metadata, **{f"{SUM}.{name}": text for name, text in sums.items()}}
    said[SUM] = _sum_of_header(said, tensors)
    text = json.dumps({"__metadata__": said, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return LENGTH.pack(len(text)) + text


def _sum_of_header(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Of what it says, however it and the data are laid out: a file may pass through other writers of the
    format. A tensor that is not where the header says has other checksums."""
    said = {name: value for name, value in metadata.items() if name != SUM}
    parts = [
        [name, _get(one, "dtype"), _get(one, "shape")] for name, one in sorted(tensors.items())
    ]
    text = json.dumps([said, parts], sort_keys=True, separators=(",", ":"))
    return _digits(crc32(text.encode()))


def _get(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def _digits(number: int) -> str:
    return f"{number:0{SUM_DIGITS}x}"


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_summed(fd: int, data: memoryview, place: int) -> str:
    """Returns its checksums, each taken of what the caches have just been given."""
    sums = []
    for begin in range(0, len(data), SUMMED):
        part = data[begin : begin + SUMMED]
        sums.append(_digits(crc32(part)))
        _write_all(fd, part, place + begin)
    return "".join(sums)


def _write_all(fd: int, rest: memoryview, place: int) -> None:
    while len(rest):
        count = os.pwrite(fd, rest, place)
        rest, place = rest[count:], place + count


def check_target(path: Path) -> None:
    """Raises BadFile where something stands at *path* that `write` should not put a file in the place of."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing; or writing will say why not
    if not stat.S_ISREG(mode):
        raise BadFile(f"{path} is a {_kind(mode)}: only a regular file is written over")


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "special file")


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when the folder is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path, mark: str = "") -> Saved:
    """What the file *path* holds, every word of it checked. Raises BadFile, naming the fault.

    mark: of the file that was written there, "" where that is not known: a whole file, with checksums that are
    right, may still be another's that was moved there.
    """
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        start = os.pread(fd, LENGTH.size, 0)
        length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
        if not 2 <= length <= HEADER_LIMIT:
            raise BadFile(
                f"{path} is no safetensors file: it does not begin with a header's length"
            )
        data = LENGTH.size + length
        if data > size:
            raise BadFile(f"{path} is cut short: its header takes {data} bytes, it has {size}")
        text = os.pread(fd, length, LENGTH.size)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadFile(f"{path} is no safetensors file: its header is not JSON") from exc
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise BadFile(f"{path} is no checkpoint of Djinn's: its header names no format")
    if metadata["format"] != FORMAT:
        raise BadFile(f'{path} is of format "{metadata["format"]}": "{FORMAT}" is needed')
    if SUM not in metadata:
        raise BadFile(f"{path} has no checksums: it was not written by Djinn, or lost them since")
    try:
        found = _sum_of_header(metadata, header)
    except RecursionError as exc:  # to write takes more of the stack than to read
        raise BadFile(f"{path} is damaged: its header is nested too deep") from exc
    if metadata[SUM] != found:
        raise BadFile(
            f"{path} is damaged: its header has the checksum {found}, not {metadata[SUM]}"
        )
    hidden, ids = (_piece(path, name, header, metadata, data) for name in ("hidden", "ids"))
    if strange := [name for name, fact in metadata.items() if not isinstance(fact, str)]:
        raise BadFile(f"{path} is no safetensors file: {strange[0]} in its metadata is no text")
    layer = metadata.get("layer", "")
    if not layer.isdecimal() or len(layer) > LAYER_DIGITS:
        raise BadFile(f"{path} is no checkpoint of Djinn's: it says no layer")
    fits = len(hidden.shape) == 3 and hidden.shape[:2] == ids.shape
    # A value inside a layer has its module's axes.
    if ids.dtype != "int64" or not (fits or metadata.get(NEEDS)):
        raise BadFile(f"{path}: ids {ids.dtype} {ids.shape} do not fit hidden {hidden.shape}")
    if mark and metadata.get(MARK) != mark:
        raise BadFile(f"{path} is another file than was written there")
    whole = data + hidden.nbytes + ids.nbytes
    if size < whole:
        raise BadFile(f"{path} is cut short: {whole} bytes are needed, it has {size}")
    if size > whole or max(hidden.begin + hidden.nbytes, ids.begin + ids.nbytes) > size:
        raise BadFile(f"{path} has {size} bytes, its header and tensors take {whole}")
    return Saved(path, size, metadata, hidden, ids)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to read from. Raises BadFile for errors of reading it, too."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo waits for a writer
        try:
            if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
                raise BadFile(f"{path} is a {_kind(mode)}: only a regular file is read")
            yield fd
        finally:
            os.close(fd)
    except OSError as exc:
        raise BadFile(f"{path} cannot be read: {exc.strerror}") from exc


def _piece(path: Path, name: str, header: Any, metadata: Any, data: int) -> Piece:
    """The tensor *name*, as the header says. data: where the tensors begin."""
    entry = header.get(name)
    try:
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as exc:
        raise BadFile(f"{path} does not say what {name} is, and where: no checkpoint") from exc
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise BadFile(f"{path}: {name} has shape {shape}, from byte {begin} to {end}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise BadFile(
            f"{path}: {name} {dtype} {shape} takes {nbytes} bytes, its place is {begin} to {end}"
        )
    sums = metadata.get(f"{SUM}.{name}")
    if not isinstance(sums, str) or len(sums) != SUM_DIGITS * -(-nbytes // SUMMED):
        raise BadFile(f"{path} has not the checksums that {nbytes} bytes of {name} need")
    return Piece(name, dtype, shape, data + begin, nbytes, sums)


def load(saved: Saved, piece: Piece) -> np.ndarray:
    """A tensor, the caller's own. Raises BadFile where it is not what was written."""
    raw = np.empty(piece.nbytes, np.uint8)
    read_into(saved, piece, raw.data)
    return over(raw.data, piece.dtype, piece.shape)


def read_into(saved: Saved, piece: Piece, target: memoryview) -> None:
    """Read a tensor's bytes into *target*, as many. Raises BadFile where they are not what was
    written; then *target* holds nothing to be used."""
    read_between(saved, piece, target, 0, piece.nbytes)


def read_between(saved: Saved, piece: Piece, target: memoryview, begin: int, end: int) -> None:
    """The same of what lies between bytes *begin* and *end*, to its place in *target*; and of what has the checksums of
    that.

    Not by a map of the file: where its disk fails, or it is cut short meanwhile, that ends who reads.
    """
    with _opened(saved.path) as fd:
        for place in range(begin // SUMMED * SUMMED, end, SUMMED):
            part = target[place : min(place + SUMMED, piece.nbytes)]
            _fill(fd, saved.path, part, piece.begin + place)
            _check(saved, piece, place, part)


def _fill(fd: int, path: Path, rest: memoryview, place: int) -> None:
    while len(rest):
        count = os.preadv(fd, [rest], place)
        if not count:
            raise BadFile(f"{path} is cut short: it ends at byte {place}")
        rest, place = rest[count:], place + count


def _check(saved: Saved, piece: Piece, begin: int, part: memoryview) -> None:
    """Is *part*, from byte *begin* of the tensor, what was written?"""
    at = begin // SUMMED * SUM_DIGITS
    wanted = piece.sums[at : at + SUM_DIGITS]
    found = _digits(crc32(part))
    if found != wanted:
        raise BadFile(
            f"{saved.path} is damaged: bytes {begin} to {begin + len(part)} of {piece.name} have the "
            f"checksum {found}, not {wanted}"
        )
