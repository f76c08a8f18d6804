"""A GPU: the one place that speaks of CUDA.

Three streams: compute (torch's current one), copies out, copies in being part of compute, because
what is fetched is needed by the very next layer. A checkpoint is written through to pinned host
memory by the copy engine while the layers behind it run; nothing waits for it but the reply.

Order on the device is by events, never by synchronizing. A slot that was given back may be leased
again while a copy into it is still under way: all stores go through one stream, and each waits for
the compute stream's work so far, so that no later store overtakes an earlier copy from or to it.
"""

from collections.abc import Callable

import numpy as np
import torch

from djinn_zmq.engine.devices import Cpu
from djinn_zmq.errors import StartError
from djinn_zmq.memory.arena import Arena

REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly


class Cuda(Cpu):
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
        self._registered: dict[int, int] = {}  # id of an arena → its address

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
        flat = data.detach().contiguous().reshape(-1).view(torch.uint8)
        ready = torch.cuda.Event()
        ready.record(self._compute)
        self._out.wait_event(ready)
        with torch.cuda.stream(self._out):
            torch.frombuffer(slot, dtype=torch.uint8).copy_(flat, non_blocking=True)
        flat.record_stream(self._out)  # the allocator must not reuse it before the copy is made

    def fetch(self, data: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=self.torch)
        flat = out.reshape(-1).view(torch.uint8)
        flat.copy_(torch.frombuffer(data, dtype=torch.uint8), non_blocking=True)
        return out

    def free_nbytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch)
        cached = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free + cached

    def mark(self) -> Callable[[], bool]:
        computed, copied = torch.cuda.Event(), torch.cuda.Event()
        computed.record(self._compute)
        copied.record(self._out)
        return lambda: computed.query() and copied.query()
