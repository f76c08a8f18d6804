"""The device an engine owns: how tensors get into and out of slots, and when its work is done.

On a CPU a copy is a memcpy and everything is done when the call returns. `cuda` has the other one.
"""

from collections.abc import Callable

import numpy as np
import torch

from djinn_zmq.memory.arena import Arena


class Cpu:
    """Plain memory."""

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def attach(self, arena: Arena) -> None:
        """*arena* will be copied to and from. Called once, before its first use."""

    def detach(self, arena: Arena) -> None:
        """*arena* is about to be unmapped."""

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        """Copy *data* into *slot* (as many bytes). Complete when `mark` after it says so."""
        flat = data.detach().contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(slot, dtype=torch.uint8).copy_(flat)

    def fetch(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own on the device from *data*: uint8 (nbytes,), host memory."""
        out = torch.empty(shape, dtype=dtype)
        out.reshape(-1).view(torch.uint8).numpy()[:] = data
        return out

    def mark(self) -> Callable[[], bool]:
        """A question: is all done that was begun before this call?"""
        return lambda: True


Device = Cpu  # what `cuda.Cuda` also is
