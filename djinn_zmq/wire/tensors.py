"""A tensor on the wire: dtype from a closed table, shape, and where its bytes are.

inline   the bytes stand in the meta itself        up to INLINE_LIMIT
frame    the bytes are the message's nth buffer    up to the bus's frame limit
slot     the bytes are in a shared arena           any size, both ends on one machine
device   the bytes are in an engine's own slab     any size, only that engine (and CUDA IPC)
file     the bytes are in the server's state directory: READ them, or have them prefetched
"""

import math
from collections.abc import Sequence

import ml_dtypes
import msgspec
import numpy as np

from djinn_zmq.errors import ProtocolError

INLINE_LIMIT = 2 * 1024  # bytes; a larger tensor is cheaper as a frame of its own
SLOT_FROM = 64 * 1024  # bytes; from here on a slot beats a frame for peers on one machine
RANK_LIMIT = 8
NBYTES_LIMIT = 1 << 44

DTYPES: dict[str, np.dtype] = {
    "bool": np.dtype(np.bool_),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # `dtype.name` is Python, and slow


class Inline(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    data: bytes


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    index: int


class Slot(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """A piece of a shared arena. A reference is good while its generation is the slot's own."""

    arena: int
    index: int
    generation: int


class Device(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    slab: int
    index: int
    generation: int


class File(msgspec.Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    number: int  # of the checkpoint whose file it is
    mark: str = ""  # that stands in it, and in no other; "": not known


Where = Inline | Frame | Slot | Device | File


class Tensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    where: Where

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def check(tensor: Tensor, buffers: Sequence[bytes | memoryview]) -> None:
    """Refuse a tensor whose words do not agree with its bytes. Allocates nothing.

    Raises ProtocolError: unknown dtype, bad shape, a missing frame, or shape × itemsize ≠ nbytes.
    Slots are checked against their arena by whoever maps it.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f'dtype "{tensor.dtype}" is not one of {", ".join(DTYPES)}')
    shape = tensor.shape
    if len(shape) > RANK_LIMIT:
        raise ProtocolError(f"a tensor of rank {len(shape)}: at most {RANK_LIMIT}")
    if shape and min(shape) < 0:
        raise ProtocolError(f"a tensor of shape {shape}: extents cannot be negative")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > NBYTES_LIMIT:
        raise ProtocolError(f"a tensor of {nbytes} bytes: at most {NBYTES_LIMIT}")
    # (0, 1 << 63) has no bytes, and still no array library can make it.
    if not nbytes and math.prod(extent or 1 for extent in shape) > NBYTES_LIMIT:
        raise ProtocolError(f"a tensor of shape {shape}: its extents are too large")
    where = tensor.where
    if isinstance(where, Inline):
        got = len(where.data)
    elif isinstance(where, Frame):
        if not 0 <= where.index < len(buffers):
            raise ProtocolError(f"buffer {where.index} of a message with {len(buffers)} buffers")
        got = len(buffers[where.index])
    else:
        return
    if got != nbytes:
        raise ProtocolError(
            f"{tensor.dtype} {shape} takes {nbytes} bytes, the message carries {got}"
        )


def view(tensor: Tensor, buffers: Sequence[bytes | memoryview]) -> np.ndarray:
    """A read-only array over an inline or frame tensor's bytes. No copy.

    *tensor* must have passed `check` against the same *buffers*.
    """
    where = tensor.where
    if isinstance(where, Inline):
        data: bytes | memoryview = where.data
    elif isinstance(where, Frame):
        data = buffers[where.index]
    else:
        raise ProtocolError(f"{type(where).__name__.lower()} tensors are not in the message")
    return over(data, tensor.dtype, tensor.shape)


def over(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of *dtype* and *shape* over *data*, with the writability of *data*. No copy."""
    count = math.prod(shape)
    return np.frombuffer(data, DTYPES[dtype], count).reshape(shape)


def dtype_name(dtype: np.dtype) -> str | None:
    """The wire's name of a numpy dtype, None where it has none (byte order counts)."""
    return NAMES.get(dtype)


def inline(array: np.ndarray) -> Tensor:
    """*array*, C-contiguous and of a wire dtype, as a tensor inside the meta."""
    return Tensor(NAMES[array.dtype], array.shape, Inline(array.tobytes()))
