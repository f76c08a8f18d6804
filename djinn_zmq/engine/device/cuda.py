"""A GPU: the one place of an engine that speaks of CUDA and cupy.

    compute   torch's current stream   layers; copies in that the very next layer needs; slab → slab
    out       a stream of its own      device → host, written through while the layers behind run
    in        a stream of its own      host → device ahead of need, both directions at once with out

Order on the device is by events, never by synchronizing. Both copy streams wait for what the compute
stream had to do when a copy was asked for, so no copy overtakes a layer that reads or writes its slot.
Slots that copies are still under way from or to are not leased again before these are done
(`Body.busy`).

Slabs are cudaMalloc's own, never the caching allocator's: an IPC handle opens a whole allocation.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.device.slabs import DeviceSlot
from djinn_zmq.errors import StartError
from djinn_zmq.memory.arena import Arena

_log = logging.getLogger(__name__)

REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly
ANY_WAY = 4  # cudaMemcpyDefault: CUDA sees by the addresses where they are
BUDGET_SHARE = 4  # a quarter of what is free when the engine starts is for checkpoints
LEFT_FREE_SHARE = 16  # of the whole device: slabs leave so much to models and their work


class Reproducibly:
    """A `with` block in which attention over a past gives the same bits every time.

    What PyTorch takes first on Hopper is cuDNN's attention. Over a past of 256 positions and more cuDNN
    splits the keys among blocks and adds their parts up in whatever order they are done: of 40 times the
    same three steps behind 1031 tokens, 30 had other bits (H200, torch 2.11, Llama-2-13B shape); with
    PyTorch's own kernels none. A prefill is the same every time, and stays as PyTorch has it.
    """

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self._before)


class Cuda(Cpu):
    reproducibly = Reproducibly
    reads_host = False

    def __init__(self, name: str) -> None:
        """Create the context on *name*, "cuda:N". Raises StartError where that fails."""
        try:
            self.torch = torch.device(name)
            torch.cuda.set_device(self.torch)
            torch.cuda.init()
        except (RuntimeError, AssertionError, ValueError) as exc:
            raise StartError(f"{name} cannot be used: {str(exc).splitlines()[0]}") from exc
        self._compute = torch.cuda.current_stream()
        self._out = torch.cuda.Stream()
        self._in = torch.cuda.Stream()
        self._registered: dict[int, int] = {}  # id of an arena → its address
        self._cupy = _cupy(self.torch.index or 0)
        # Looked up once: where that is cold each of these is several misses on the way of a resume.
        self._layers = self._compute.cuda_stream
        self._memcpy = self._cupy and self._cupy.cuda.runtime.memcpyAsync

    # ---- host memory

    def attach(self, arena: Arena) -> None:
        """Register the arena's pages with the driver: copies then run at the bus's full rate and
        without the CPU. In one piece: a copy across two registrations fails."""
        address = np.frombuffer(arena.memory, np.uint8).ctypes.data
        flags = 0 if arena.writable else REGISTER_READ_ONLY
        status = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, flags)
        if int(status) == 0:
            self._registered[id(arena)] = address
        elif arena.writable:
            raise StartError(f"CUDA refuses to register an arena: error {int(status)}")
        # A client's arena that it refuses still works: pageable, at a third of the speed.

    def detach(self, arena: Arena) -> None:
        address = self._registered.pop(id(arena), None)
        if address is not None:
            torch.cuda.synchronize()  # a copy may still be on its way; a client's end is no hot path
            torch.cuda.cudart().cudaHostUnregister(address)

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        data = data.contiguous()
        self._out.wait_event(self._event(self._compute))
        self._move(torch.frombuffer(slot, dtype=torch.uint8), data, self._out)
        data.record_stream(self._out)  # the allocator must not reuse it before the copy is made

    def fetch(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=self.torch)
        if data.size:
            source = torch.frombuffer(data, dtype=torch.uint8)
            self._move(out.reshape(-1).view(torch.uint8), source, self._compute)
        return out

    def free_nbytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch)
        cached = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free + cached

    def see(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.fetch(data, shape, dtype)  # layers read device memory

    # ---- the device tier

    def budget(self) -> int:
        if self._cupy is None:
            return 0
        free, _ = torch.cuda.mem_get_info(self.torch)
        return free // BUDGET_SHARE

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        free, total = torch.cuda.mem_get_info(self.torch)
        if self._cupy is None or free - nbytes < total // LEFT_FREE_SHARE:
            return None
        try:
            pointer = self._cupy.cuda.runtime.malloc(nbytes)
        except self._cupy.cuda.runtime.CUDARuntimeError:
            return None
        memory = self._cupy.cuda.UnownedMemory(pointer, nbytes, None)  # never freed by anybody
        place = self._cupy.cuda.MemoryPointer(memory, 0)
        array = self._cupy.ndarray((nbytes,), dtype=self._cupy.uint8, memptr=place)
        slab: torch.Tensor = torch.from_dlpack(array)
        return slab

    def copy(self, data: torch.Tensor, slot: DeviceSlot) -> None:
        data = data.contiguous()
        self._copy(slot.address, data.data_ptr(), data.nbytes, self._layers)

    def fill(self, data: np.ndarray, slot: DeviceSlot) -> None:
        address = data.__array_interface__["data"][
            0
        ]  # a tensor made of it takes five times as long
        self._copy(slot.address, address, data.nbytes, self._layers)

    def fill_beside(self, data: np.ndarray, target: torch.Tensor) -> None:
        self._in.wait_event(self._event(self._compute))
        self._move(target, torch.frombuffer(data, dtype=torch.uint8), self._in)

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Begin to copy between two addresses on *stream*, CUDA's own; where there are slabs there is cupy.
        Its call costs 7 to 9 us, torch's 20 to 50 with what it takes to make tensors fit (H200, between
        other work)."""
        self._memcpy(target, source, nbytes, ANY_WAY, stream)

    def _move(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """The same with the bytes of *source*, contiguous."""
        if self._cupy is not None:
            self._copy(target.data_ptr(), source.data_ptr(), source.nbytes, stream.cuda_stream)
            return
        torch.cuda.set_stream(stream)
        try:
            target.copy_(source.detach().reshape(-1).view(torch.uint8), non_blocking=True)
        finally:
            torch.cuda.set_stream(self._compute)

    def export(self, slab: torch.Tensor) -> tuple[str, bytes]:
        """The device's UUID, and the handle by which another process opens *slab*."""
        properties = self._cupy.cuda.runtime.getDeviceProperties(self.torch.index or 0)
        handle = self._cupy.cuda.runtime.ipcGetMemHandle(slab.data_ptr())
        return bytes(properties["uuid"]).hex(), bytes(handle)

    # ---- order

    def _event(self, stream: Any) -> Any:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def computed(self) -> Callable[[], bool]:
        done: Callable[[], bool] = self._event(self._compute).query
        return done

    def stored(self) -> Callable[[], bool]:
        done: Callable[[], bool] = self._event(self._out).query
        return done

    def filled(self) -> Callable[[], bool]:
        done: Callable[[], bool] = self._event(self._in).query
        return done

    def broken(self, error: BaseException) -> str:
        if "CUDA" not in str(error):
            return ""
        try:
            torch.cuda.synchronize()
        except RuntimeError as exc:  # it stays: no call succeeds any more in this process
            return f"its CUDA context is poisoned: {str(exc).splitlines()[0]}"
        return ""


def _cupy(index: int) -> Any:
    """cupy, using the device *index*; None, and a word in the log, where there is none."""
    try:
        import cupy
    except ImportError as exc:
        _log.warning(
            "no device tier: cupy is missing (%s): pip install 'djinn-zmq[cuda12]' or [cuda13]", exc
        )
        return None
    cupy.cuda.Device(index).use()
    return cupy
