"""Device slots: pieces of slabs that the engine allocates itself and frees only by ending.

A slab is one allocation of the device's, so that a client who opens it (CUDA IPC opens whole
allocations) finds checkpoints there and nothing else. A slot's generation is counted up when it is
leased, so that a reference to what it held before is known to be stale.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import torch

from djinn_zmq.errors import ArenaFull, StaleSlot
from djinn_zmq.memory.arena import GRANULE, Lease, granules_for
from djinn_zmq.memory.freelist import FreeList
from djinn_zmq.settings import MIB, format_bytes
from djinn_zmq.wire.tensors import Device as Where

SLAB_NBYTES = 256 * MIB
SLABS = 4  # at least so many fit the limit
LEAST_SLAB = 1 * MIB
COPIES = " copies"  # ends the name of a zone for what clients write into

Allocate = Callable[[int], torch.Tensor | None]


@dataclass(slots=True, eq=False)
class DeviceSlot:
    """where: names it on the wire. address, nbytes: where a copy to or from it begins, and how long it is."""

    where: Where
    address: int
    nbytes: int
    slab: "Slab"

    @property
    def data(self) -> torch.Tensor:
        """uint8 (nbytes,), on the device. Made when it is asked for: that costs 20 us where it is cold."""
        begin = self.where.index * GRANULE
        return self.slab.memory[begin : begin + self.nbytes]


@dataclass(slots=True, eq=False)
class Spare:
    """Room for one more checkpoint, on the device and, where there was some, in host memory."""

    slot: DeviceSlot
    lease: Lease | None


class Slab:
    def __init__(self, number: int, memory: torch.Tensor, zone: str) -> None:
        """memory: uint8 (nbytes,), on the device. zone: whose checkpoints it holds."""
        self.number = number
        self.zone = zone
        self.exported = False  # a client has opened it: then it keeps its zone for good
        self.memory = memory
        self.address = memory.data_ptr()
        self.free = FreeList()
        self.free.give(0, memory.numel() // GRANULE)
        self.generations: dict[int, int] = {}  # by first granule, of slots that have been leased
        # A client may still know the slots of an engine before this one: they must be stale here.
        self._first = secrets.randbits(31)
        self.leased: dict[int, int] = {}  # first granule → granules

    def lease(self, nbytes: int) -> DeviceSlot | None:
        need = granules_for(nbytes)
        start = self.free.take(need)
        if start is None:
            return None
        generation = self.generations[start] = self.generations.get(start, self._first) + 1
        self.leased[start] = need
        where = Where(self.number, start, generation)
        return DeviceSlot(where, self.address + start * GRANULE, nbytes, self)

    def give_back(self, where: Where) -> None:
        if where.index not in self.leased or self.generations[where.index] != where.generation:
            raise StaleSlot(f"slot {where.index} of slab {self.number} has been given back")
        self.free.give(where.index, self.leased.pop(where.index))


class Slabs:
    """Slots from as many slabs as a limit allows; the next slab is made when it is needed."""

    def __init__(self, limit: int, allocate: Allocate, slab_nbytes: int = SLAB_NBYTES) -> None:
        """limit, slab_nbytes: bytes; 0: there is no device tier. allocate: gives device memory, uint8
        (nbytes,), or None where the device has no more of it."""
        self.limit = limit
        self.slabs: dict[int, Slab] = {}
        self._allocate = allocate
        # Several even of a small limit: a slab is one zone's.
        fourth = max(limit // SLABS, LEAST_SLAB) // GRANULE * GRANULE
        self._slab_nbytes = min(slab_nbytes, fourth, limit)

    @property
    def mapped(self) -> int:
        return sum(slab.memory.numel() for slab in self.slabs.values())

    @property
    def used(self) -> int:
        return self.mapped - self.free

    @property
    def free(self) -> int:
        """Bytes free in slabs that there are."""
        return sum(slab.free.total for slab in self.slabs.values()) * GRANULE

    def lease(self, nbytes: int, zone: str = "") -> DeviceSlot | None:
        """A slot of *nbytes* in a slab of *zone*, or None where there is no room."""
        for slab in self.slabs.values():
            if slab.zone != zone and (slab.leased or slab.exported):
                continue
            slot = slab.lease(nbytes)
            if slot is not None:
                slab.zone = zone
                return slot
        slab = self._grow(nbytes, zone)
        return None if slab is None else slab.lease(nbytes)

    def lease_beside(self, where: Where, nbytes: int) -> DeviceSlot | None:
        """One more in the slab of *where*, or None where that has no room."""
        return self.slabs[where.slab].lease(nbytes)

    def _grow(self, nbytes: int, zone: str) -> Slab | None:
        room = self.limit - self.mapped
        # Else checkpoints would leave clients nothing to write into.
        copies = any(slab.zone.endswith(COPIES) for slab in self.slabs.values())
        if not (zone.endswith(COPIES) or copies) and self.limit > self._slab_nbytes:
            room -= self._slab_nbytes
        size = max(granules_for(nbytes) * GRANULE, min(self._slab_nbytes, room))
        if size > room:
            return None
        memory = self._allocate(size)
        if memory is None:
            self.limit = self.mapped  # other programs use the device, too: it gives us no more
            return None
        number = len(self.slabs) + 1
        slab = self.slabs[number] = Slab(number, memory, zone)
        return slab

    def may_hold(self, slab: Slab, nbytes: int, zone: str) -> bool:
        """Could a slot of *nbytes* of *zone* be in *slab*, if nothing else were there?"""
        if slab.exported and slab.zone != zone:
            return False
        return granules_for(nbytes) <= slab.memory.numel() // GRANULE

    def give_back(self, where: Where) -> None:
        """Raises StaleSlot if it has been given back already."""
        self.slabs[where.slab].give_back(where)

    def full(self, nbytes: int) -> ArenaFull:
        """What to say where `lease` gave nothing and nothing can make room."""
        room = self.limit - self.mapped
        largest = max((slab.free.largest * GRANULE for slab in self.slabs.values()), default=0)
        return ArenaFull(
            f"{format_bytes(nbytes)} of device memory asked, {format_bytes(max(largest, room))} free "
            f"in one piece, {format_bytes(self.free + room)} free in all, limit "
            f"{format_bytes(self.limit)}: release or evict checkpoints, or serve with more --gpu-memory"
        )
