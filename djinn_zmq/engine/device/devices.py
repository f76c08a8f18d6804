"""The device an engine owns: how tensors get into and out of slots, and when its work is done.

On a CPU a copy is a memcpy and everything is done when the call returns. `cuda` has the other one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from djinn_zmq.engine.device.slabs import DeviceSlot
from djinn_zmq.errors import RequestError
from djinn_zmq.memory.arena import Arena


class Broken(Exception):
    """The device is of no use any more, and with it this process. The sentence says why."""


class Cpu:
    """Plain memory. Its device tier is plain memory, too, where one is asked for."""

    # What layers that go on from a past are run under, so that they give the same bits every time.
    reproducibly: Callable[[], AbstractContextManager[object]] = nullcontext

    reads_host = True  # its layers take a hidden state from host memory as it is

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def attach(self, arena: Arena) -> None:
        """*arena* will be copied to and from. Called once, before its first use."""

    def detach(self, arena: Arena) -> None:
        """*arena* is about to be unmapped."""

    # ---- host memory

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        """Copy *data* into *slot* (as many bytes). Complete when `stored` after it says so."""
        flat = data.detach().contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(slot, dtype=torch.uint8).copy_(flat)

    def fetch(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own on the device from *data*: uint8 (nbytes,), host memory."""
        out = torch.empty(shape, dtype=dtype)
        out.reshape(-1).view(torch.uint8).numpy()[:] = data
        return out

    def see(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor to be read only, from *data* as in `fetch`; a view of it where the device can
        read host memory."""
        if not data.size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(np.asarray(_Unflagged(data))).view(dtype).reshape(shape)

    # ---- the device tier

    def budget(self) -> int:
        """Bytes its device tier may have where nobody said: a CPU reads host memory as it is."""
        return 0

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        """Memory for a slab, uint8 (nbytes,), or None where there is no more."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError:
            return None

    def copy(self, data: torch.Tensor, slot: DeviceSlot) -> None:
        """Copy *data*, as many bytes, into *slot*."""
        slot.data.copy_(data.detach().contiguous().reshape(-1).view(torch.uint8))

    def fill(self, data: np.ndarray, slot: DeviceSlot) -> None:
        """Copy host memory, uint8 (nbytes,), into *slot*, ahead of the layers begun after it."""
        slot.data.numpy()[:] = data

    def fill_beside(self, data: np.ndarray, target: torch.Tensor) -> None:
        """The same into any memory of the device's, uint8 (nbytes,), beside the layers: complete when
        `filled` says so."""
        target.numpy()[:] = data

    def free_nbytes(self) -> int:
        """Bytes that are free for activations."""
        try:
            with open("/proc/meminfo") as lines:
                found = dict(line.split(":", 1) for line in lines)
            return int(found["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return 1 << 62  # not Linux as we know it: the other limits hold

    def export(self, slab: torch.Tensor) -> tuple[str, bytes]:
        """The device's UUID, and the handle by which another process opens *slab*."""
        raise RequestError("this engine is on a CPU: there is no CUDA memory to open")

    # ---- order

    def computed(self) -> Callable[[], bool]:
        """A question: are all layers done that were begun before this call, and copies in that these
        wait for?"""
        return lambda: True

    def stored(self) -> Callable[[], bool]:
        """The same of copies out, and of what these waited for."""
        return lambda: True

    def filled(self) -> Callable[[], bool]:
        """The same of copies in beside the layers."""
        return lambda: True

    def broken(self, error: BaseException) -> str:
        """Why the device is of no use any more after *error*; "" where it goes on working."""
        return ""


class _Unflagged:
    """An array's memory without its read-only flag, which torch would warn of. Nobody writes."""

    def __init__(self, data: np.ndarray) -> None:
        interface: dict[str, Any] = dict(data.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._data = data  # keeps the memory mapped


Device = Cpu  # what `cuda.Cuda` also is
