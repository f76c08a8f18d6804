"""torch's tensors as numpy's arrays and back, bit for bit."""

from typing import Any

import numpy as np
import torch

from djinn_zmq.errors import NotServed
from djinn_zmq.wire.tensors import DTYPES

BFLOAT16 = DTYPES["bfloat16"]


def to_numpy(name: str, data: Any, dtype: torch.dtype | None = None) -> np.ndarray:
    """A tensor, or what makes one, in host memory. name: of the argument, for the error.

    Raises NotServed for a dtype that does not travel.
    """
    tensor = torch.as_tensor(data).detach().cpu()
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise NotServed(f"{name} of dtype {tensor.dtype}: one of {', '.join(DTYPES)}")
    return tensor.numpy()


def to_torch(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor over *array*'s own memory, or on *device* a copy of it."""
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(device)
