"""A client's side of the device tier: an engine's slabs, opened by CUDA IPC. Needs cupy.

    engine   slab of 256 MiB  ── handle ──▶  client   opened once; a slot of it is a tensor

Nothing is copied. Devices are matched by UUID: their numbers differ between processes.

A tensor that nothing refers to may still be read or written by kernels that were queued before, and the
engine gives its slot to others: it is said to be given up only when the device is through with them.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from djinn_zmq.errors import RequestError
from djinn_zmq.memory.arena import GRANULE
from djinn_zmq.wire.tensors import DTYPES, Tensor
from djinn_zmq.wire.tensors import Device as Slot
from djinn_zmq.wire.tiers import Handle

ANY_WAY = 4  # cudaMemcpyDefault: CUDA sees by the addresses where they are
PLAIN_STREAM = 0  # CUDA's default one


class _Opened:
    """A slab, open as long as anything refers to this."""

    def __init__(self, cupy: Any, device: int, handle: Handle) -> None:
        with cupy.cuda.Device(device):
            self.pointer: int = cupy.cuda.runtime.ipcOpenMemHandle(handle.data)
        self.device = device
        self.epoch = handle.epoch
        close = weakref.finalize(self, _close, cupy, device, self.pointer)
        close.atexit = False  # the process's end closes it as well


def _close(cupy: Any, device: int, pointer: int) -> None:
    with cupy.cuda.Device(device):
        cupy.cuda.runtime.ipcCloseMemHandle(pointer)


class _Mapped:
    """What a tensor's memory belongs to: the slab stays open, and the hold lasts, as long as it."""

    def __init__(self, opened: _Opened) -> None:
        self.opened = opened


@dataclass(slots=True, eq=False)
class _Writable:
    """What `CudaMemory.writable` gave. spare: in the same slab; None: there is none, or it is on its way.
    given: spares that were given away with requests under way."""

    tensor: Tensor
    device: int
    address: int
    spare: Slot | None
    given: set[Slot] = field(default_factory=set)

    def address_of(self, slot: Slot) -> int:
        where = self.tensor.where
        assert isinstance(where, Slot) and slot.slab == where.slab
        return self.address + (slot.index - where.index) * GRANULE


class CudaMemory:
    """The slabs that one connection has opened, and the slots in them it may write into."""

    def __init__(self) -> None:
        self._cupy = _imported()
        self._runtime = self._cupy.cuda.runtime
        self._devices = _devices(self._cupy)
        self._opened: dict[bytes, _Opened] = {}
        self._writable: dict[int, _Writable] = {}  # by address
        # Devices on which tensors have gone: kernels may still use these.
        self._ended: set[int] = set()

    def tensor(self, tensor: Tensor, handle: Handle, end: Callable[[], None]) -> Any:
        """The slot as a torch tensor where torch is imported, else as a cupy array.

        end: called when nothing refers to it any more; what it says is to be said after `settle`.
        """
        cupy, opened = self._cupy, self._open(handle)

        def ended() -> None:
            self._ended.add(opened.device)
            end()

        owner = _Mapped(opened)
        memory = cupy.cuda.UnownedMemory(
            opened.pointer + handle.offset, tensor.nbytes, owner, opened.device
        )
        weakref.finalize(owner, ended).atexit = False
        place = cupy.cuda.MemoryPointer(memory, 0)
        raw = cupy.ndarray((tensor.nbytes,), dtype=cupy.uint8, memptr=place)
        torch = sys.modules.get("torch")
        if torch is not None:
            flat = torch.from_dlpack(raw)
            return flat.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)
        if tensor.dtype == "bfloat16":  # numpy has it from ml_dtypes; not every cupy takes that
            return raw.view(cupy.uint16).reshape(tensor.shape)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def writable(
        self, tensor: Tensor, handle: Handle, spare: Slot | None, end: Callable[[], None]
    ) -> Any:
        """The same, to be found again by `sent`. spare: a slot to give away with what is in it."""
        opened = self._open(handle)
        address = opened.pointer + handle.offset

        def forget() -> None:
            self._writable.pop(address, None)
            end()

        made = self.tensor(tensor, handle, forget)
        self._writable[address] = _Writable(tensor, opened.device, address, spare)
        return made

    def sent(self, value: Any, *, to_keep: bool) -> Tensor | None:
        """How *value* travels if it is what `writable` gave, its edits complete; else None.

        to_keep: it becomes a checkpoint as it is. Then a copy of it is given away, where there is a
        spare: by this process, whose kernels have just run on the GPU, in 0.02 ms; the engine's would
        take 0.25, and the client's next kernel is in it (H200).
        """
        found = self._writable.get(address_of(value))
        if found is None or tuple(value.shape) != found.tensor.shape or not _in_order(value):
            return None
        if self._runtime.getDevice() == found.device:
            return self._completed(found, to_keep)
        with self._cupy.cuda.Device(found.device):
            return self._completed(found, to_keep)

    def _completed(self, found: _Writable, to_keep: bool) -> Tensor:
        runtime, tensor, spare = self._runtime, found.tensor, found.spare
        runtime.deviceSynchronize()  # the edits may be on any stream
        if not to_keep or spare is None:
            return tensor
        found.spare = None
        found.given.add(spare)
        runtime.memcpyAsync(
            found.address_of(spare), found.address, tensor.nbytes, ANY_WAY, PLAIN_STREAM
        )
        runtime.streamSynchronize(PLAIN_STREAM)
        return Tensor(tensor.dtype, tensor.shape, spare)

    def restock(self, value: Any, sent: Tensor, spare: Slot | None) -> None:
        """*sent*, as *value* travelled, has been answered. *spare*: the next that may be given away for it.

        Where several requests are under way, one that was sent before a spare was given away may be
        answered with the name of that very spare: it is a checkpoint by now, or about to become one.
        """
        found = self._writable.get(address_of(value))
        if found is not None and isinstance(sent.where, Slot):
            found.given.discard(sent.where)
            if spare is not None and spare not in found.given:
                found.spare = spare

    def settle(self) -> None:
        """Wait for all kernels that may use a tensor that has gone."""
        while self._ended:
            device = self._ended.pop()
            # Where the context is broken nothing runs in it any more, and its user hears of it from CUDA.
            with (
                contextlib.suppress(self._runtime.CUDARuntimeError),
                self._cupy.cuda.Device(device),
            ):
                self._runtime.deviceSynchronize()

    def _open(self, handle: Handle) -> _Opened:
        opened = self._opened.get(handle.data)
        if opened is None:
            device = self._devices.get(handle.uuid)
            if device is None:
                raise RequestError(
                    f"this process does not see the engine's GPU {handle.uuid}: look at "
                    "CUDA_VISIBLE_DEVICES"
                )
            # Those of an engine before this one are closed when their last tensor goes.
            for data, one in list(self._opened.items()):
                if one.epoch != handle.epoch:
                    del self._opened[data]
            opened = self._opened[handle.data] = _Opened(self._cupy, device, handle)
        return opened


def _in_order(value: Any) -> bool:
    """Do its elements lie in the slot as they are counted? Not those of a transposed view."""
    if hasattr(value, "is_contiguous"):
        return bool(value.is_contiguous())
    return bool(value.flags.c_contiguous)


def address_of(value: Any) -> int:
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    return int(value.data.ptr)


def _devices(cupy: Any) -> dict[str, int]:
    """This process's number of each device, by UUID."""
    runtime = cupy.cuda.runtime
    return {
        bytes(runtime.getDeviceProperties(number)["uuid"]).hex(): number
        for number in range(runtime.getDeviceCount())
    }


def _imported() -> Any:
    try:
        import cupy
    except ImportError as exc:
        raise RequestError(
            f"CUDA tensors need cupy ({exc}): pip install 'djinn-zmq[cuda12]' or 'djinn-zmq[cuda13]'"
        ) from exc
    return cupy
