"""torch's tensors as numpy's arrays and back, bit for bit."""

import contextlib
import operator
from typing import Any

import numpy as np
import torch

from djinn_zmq.client import checks
from djinn_zmq.errors import NotServed, RequestError
from djinn_zmq.wire.tensors import DTYPES

BFLOAT16 = DTYPES["bfloat16"]


def as_tensor(name: str, data: Any, *, whole: bool = False) -> torch.Tensor:
    """A tensor, or what makes one. name: of the argument, for the error. whole: of whole numbers.

    Raises RequestError for anything else.
    """
    try:
        tensor = torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError, OverflowError) as exc:
        raise RequestError(
            f"{name}={checks.shown(data)}: a tensor, or lists of numbers of one length"
        ) from exc
    if whole and tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise RequestError(f"{name} of dtype {tensor.dtype}: whole numbers")
    return tensor


def to_numpy(name: str, data: Any, dtype: torch.dtype | None = None) -> np.ndarray:
    """The same in host memory. dtype: it becomes that one; int64 of whole numbers alone.

    Raises NotServed for a dtype that does not travel.
    """
    tensor = as_tensor(name, data, whole=dtype is torch.int64).detach()
    if tensor.is_meta:
        raise NotServed(f'{name} on "meta": it has no values to send')
    tensor = tensor.cpu()
    if dtype is not None:
        tensor = tensor.to(dtype)
    if (found := checks.of_bfloat16(tensor)) is not None:
        return found
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise NotServed(f"{name} of dtype {tensor.dtype}: one of {', '.join(DTYPES)}")
    return tensor.numpy()


def whole(name: str, value: Any, *, least: int = -checks.LARGEST) -> int:
    """A whole number, a tensor's only one too. Raises RequestError for anything else."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        value = operator.index(value)
    return checks.whole(name, value, least=least)


def flag(name: str, value: Any) -> bool:
    """Whether *value* counts as true, as in transformers. Raises RequestError where that is not clear."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise RequestError(f"{name}={checks.shown(value)}: True or False") from exc


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor over *array*'s own memory, or on *device* a copy of it."""
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(device)
