"""The memory a client shares with a server of the same user on the same machine.

Its own arenas, in which it sends tensors, and the engines', which it reads. Without a lease there is
neither, and everything travels over the bus.
"""

import math
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from djinn_zmq.bus.lease import LeaseSocket, close_all
from djinn_zmq.errors import ArenaFull, Lost, RequestError
from djinn_zmq.memory.arena import Arena, Lease, OwnArena, Pool
from djinn_zmq.settings import Settings
from djinn_zmq.wire import messages
from djinn_zmq.wire.tensors import NAMES, Slot, Tensor

if TYPE_CHECKING:  # a room that only those on a GPU need
    from djinn_zmq.client.cuda import CudaMemory


class _Given(NamedTuple):
    """An array of `Sharing.array`, as it was when it was given, and how it travels."""

    array: "weakref.ref[np.ndarray]"
    dtype: np.dtype
    strides: tuple[int, ...]
    tensor: Tensor


class Sharing:
    def __init__(self, settings: Settings) -> None:
        self.lease: LeaseSocket | None = None
        self._settings = settings
        self._arenas: dict[int, Arena] = {}
        self._pool: Pool | None = None
        self._lent: dict[int, Lease] = {}  # by address: slots that are the user's arrays
        self._given: dict[int, _Given] = {}  # by id: these arrays themselves, as long as they live
        self._cuda: CudaMemory | None = None
        # To be given back: of arrays that are gone, and what a finalizer has ended.
        self._ended: deque[int | Lease] = deque()

    def join(self, path: str | os.PathLike[str], token: bytes) -> None:
        """Share from now on. Raises Unreachable, AccessDenied, Lost where that cannot be."""
        self.lease = LeaseSocket.connect(path, token)

    def news(self) -> list[messages.Lease]:
        """What the server has said unasked. Raises Lost where it is gone."""
        if self.lease is None:
            return []
        packets = []
        for packet, fds in self.lease.news():
            close_all(fds)
            packets.append(packet)
        return packets

    def stage(self, nbytes: int) -> Lease:
        """A slot of this client's own arenas. Raises ArenaFull beyond their limit."""
        while self._ended:
            ended = self._ended.popleft()
            self.give_back(self._lent.pop(ended) if isinstance(ended, int) else ended)
        if self._pool is None:
            limit, size = self._settings.client_arenas, self._settings.arena
            self._pool = Pool(limit, size, self._share, "client", self._retire)
        return self._pool.lease(nbytes, 0)

    def _share(self, arena: OwnArena) -> int:
        assert self.lease is not None
        granted, _ = self.lease.ask(messages.Share(), arena.fd)
        return granted.arena

    def _retire(self, arena: OwnArena) -> None:
        """*arena* holds nothing, and is too small for what is staged now."""
        assert self.lease is not None
        self.lease.send(messages.Retire(arena.number))

    def array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array in a slot of its own, which `given` and `slot_of` find again; the slot comes back
        when nothing refers to the array any more."""
        nbytes = math.prod(shape) * dtype.itemsize
        lease = self.stage(nbytes)
        root = np.frombuffer(lease.view, np.uint8)
        address = root.__array_interface__["data"][0]
        self._lent[address] = lease
        # From a finalizer, which may run in the middle of anything: only noted.
        weakref.finalize(root, self._ended.append, address).atexit = False
        array = root.view(dtype).reshape(shape)
        number, forget = id(array), self._given.pop
        there = weakref.ref(array, lambda _: forget(number, None))
        tensor = Tensor(NAMES[dtype], shape, lease.slot)
        self._given[number] = _Given(there, array.dtype, array.strides, tensor)
        return array

    def given(self, value: Any) -> Tensor | None:
        """How *value* travels, if it is what `array` gave, and still as it was. What `slot_of` looks at,
        an array's address, dtype and order, takes 50 us where it is cold: behind 10 MB being written."""
        known = self._given.get(id(value))
        if known is None or known.array() is not value:
            return None
        tensor = known.tensor
        laid_out = value.dtype is known.dtype and value.strides == known.strides
        return tensor if laid_out and value.shape == tensor.shape else None

    def slot_of(self, array: np.ndarray) -> Slot | None:
        """The slot that *array*, C-contiguous, fills from its start to its end, if it is one of `array`'s."""
        if not self._lent:
            return None
        lease = self._lent.get(array.__array_interface__["data"][0])
        return lease.slot if lease is not None and len(lease.view) == array.nbytes else None

    def cuda(self) -> "CudaMemory":
        """Raises RequestError where there is no lease, or no cupy."""
        if self.lease is None:
            raise RequestError(
                "CUDA memory is shared only on the server's own machine, with its own user: read "
                "hidden, or use writable()"
            )
        if self._cuda is None:
            from djinn_zmq.client.cuda import CudaMemory  # on first use

            self._cuda = CudaMemory()
        return self._cuda

    def settle(self) -> None:
        """Before it is said what nothing refers to any more: the GPU may be at work on it."""
        if self._cuda is not None:
            self._cuda.settle()

    def give_back(self, lease: Lease) -> None:
        assert self._pool is not None
        self._pool.give_back(lease.slot)

    def give_back_later(self, lease: Lease) -> None:
        """Before the next one is staged: safe to call from a finalizer."""
        self._ended.append(lease)

    def arena(self, number: int) -> Arena:
        """Anybody's shared arena, mapped on first use."""
        arena = self._arenas.get(number)
        if arena is None:
            if self.lease is None:
                raise ArenaFull("this connection shares no memory with the server")
            _, fd = self.lease.ask(messages.Want(number))
            if fd is None:
                raise Lost(f"arena {number} came without a descriptor")
            # Their pages are not free before we let go of them too.
            for gone in [one for one in self._arenas.values() if one.retired]:
                self._arenas.pop(gone.number).close()
            arena = self._arenas[number] = Arena(number, fd)
        return arena

    def can_map(self, tensor: Tensor) -> bool:
        return self.lease is not None and isinstance(tensor.where, Slot)

    def leave(self) -> None:
        """In a child that was forked: hang up there, which its parent does not notice."""
        if self.lease is not None:
            self.lease.close()
            self.lease = None

    def close(self) -> None:
        """Unmap all of it, and hang up: the server takes that for the end of this client."""
        for arena in self._arenas.values():
            arena.close()
        if self._pool is not None:
            self._pool.close()
        if self.lease is not None:
            self.lease.close()


def on_device(value: Any) -> bool:
    """Is *value* a tensor in a GPU's memory, torch's or cupy's?"""
    return bool(getattr(value, "is_cuda", False)) or type(value).__module__.startswith("cupy")
