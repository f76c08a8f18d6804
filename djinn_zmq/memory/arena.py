"""Arenas: one process writes and hands out slots, any process that has the descriptor reads them.

    0          64                      data
    ┌──────────┬───────────────────────┬────────┬────────┬───────────────┬──────
    │ header   │ table: one entry for  │ slot 0 │ slot 1 │    slot 2     │ ...
    │ 64 bytes │ each granule of data  │        │        │               │
    └──────────┴───────────────────────┴────────┴────────┴───────────────┴──────
                 u32 generation            a slot is a run of granules (4 KiB each);
                 u32 granules (0: free)    its index is its first granule
                   top bit: still filled

The table stands in the shared memory itself, so a slot's fate is seen by every reader, and survives
the owner. Each arena has exactly one process that leases its slots, so no lock is needed: the owner
raises the generation before a slot is used again, and a reader compares it after copying. A slot
that a device is still copying to says so, and is not read meanwhile: so its owner need not wait for the
copy before it tells of the slot.
"""

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from djinn_zmq.errors import ArenaFull, Closed, OnDevice, ProtocolError, StaleSlot
from djinn_zmq.memory import shared
from djinn_zmq.memory.freelist import FreeList
from djinn_zmq.settings import format_bytes
from djinn_zmq.wire.tensors import Slot

GRANULE = 4096  # bytes
MAGIC = b"DJARENA1"
HEADER = struct.Struct("<8sIIQ")  # magic, granule, count of granules, offset of the data
RETIRED_AT = HEADER.size  # u8: 1 once its server has let go of it
HEADER_ROOM = 64
ENTRY_SIZE = 8  # u32 generation, u32 granules
FILLING = 1 << 31  # in the granules of a slot that is not filled yet


def data_offset(count: int) -> int:
    """Where the data of an arena with *count* granules begins: the table, rounded to a granule."""
    return -(-(HEADER_ROOM + count * ENTRY_SIZE) // GRANULE) * GRANULE


def total_size(count: int) -> int:
    return data_offset(count) + count * GRANULE


def mark_retired(fd: int) -> None:
    """Tell all who map the arena behind *fd*, which is open for writing, that nothing will be in it again."""
    os.pwrite(fd, b"\1", RETIRED_AT)


def granules_for(nbytes: int) -> int:
    return max(1, -(-nbytes // GRANULE))


@dataclass(slots=True, eq=False)  # not frozen: that makes one take five times as long
class Lease:
    """A slot in use, and by whom.

    view: the slot's bytes, exactly the number asked for, writable by the owner.
    """

    slot: Slot
    view: memoryview
    holder: int


class Arena:
    """An arena mapped for reading. The owner's side is `OwnArena`."""

    def __init__(self, number: int, fd: int, *, writable: bool = False) -> None:
        """Take over *fd* (closed by `close`, and here where this raises) and map it.

        Raises ProtocolError where it is not sealed, its header does not fit its size, or it may
        not be mapped for writing, ArenaFull where this process can map no more.
        """
        self.number = number
        self.fd = fd
        self.writable = writable
        self._map: mmap.mmap | None = None
        try:
            self._open(writable)
        except BaseException:
            self._unmap()
            os.close(fd)
            raise

    def _open(self, writable: bool) -> None:
        self.nbytes = shared.sealed_size(self.fd)
        if self.nbytes < HEADER_ROOM:
            raise ProtocolError(f"{self.nbytes} bytes are no arena")
        try:
            self._map = shared.mapped(self.fd, self.nbytes, writable=writable)
        except OSError as exc:  # no addresses, or no descriptor: a map has one of its own
            raise ArenaFull(
                f"{format_bytes(self.nbytes)} of shared memory to be mapped: {exc.strerror}"
            ) from exc
        self._memory = memoryview(self._map)
        magic, granule, count, offset = HEADER.unpack_from(bytes(self._memory[: HEADER.size]))
        if (
            magic != MAGIC
            or granule != GRANULE
            or offset != data_offset(count)
            or self.nbytes != total_size(count)
        ):
            self._memory.release()
            raise ProtocolError("the shared memory is no arena: its header does not fit its size")
        self.count: int = count
        self._data = offset
        # [2 * granule] is its generation, [2 * granule + 1] the length of the slot that starts there
        table = self._memory[HEADER_ROOM : HEADER_ROOM + count * ENTRY_SIZE]
        self._table: memoryview[int] = table.cast("I")
        table.release()

    @property
    def memory(self) -> memoryview:
        """All of the arena, header and table included; for a driver that registers its pages."""
        return self._memory

    @property
    def retired(self) -> bool:
        """Has its server let go of it? Then nothing will ever be in it again."""
        return self._memory[RETIRED_AT] != 0

    def view(self, slot: Slot, nbytes: int) -> memoryview:
        """The first *nbytes* of *slot*. No copy; call `check` again after reading.

        Raises StaleSlot for a passed generation, ProtocolError for a place the slot does not have,
        OnDevice while it is not filled yet.
        """
        # Taken once: the owner, or a peer that lies, may change it between two looks.
        entry = self._granules(slot)
        granules = entry & ~FILLING
        if not 0 <= nbytes <= granules * GRANULE or slot.index + granules > self.count:
            raise ProtocolError(
                f"{nbytes} bytes of slot {slot.index}, which has {granules * GRANULE}"
            )
        if entry & FILLING:
            raise OnDevice(f"slot {slot.index} of arena {self.number} is still being filled")
        start = self._data + slot.index * GRANULE
        return self._memory[start : start + nbytes]

    def check(self, slot: Slot) -> None:
        """Raises StaleSlot if *slot* has been given back since the reference was made."""
        self._granules(slot)

    def _granules(self, slot: Slot) -> int:
        """The length of *slot*, where the reference is still good; with FILLING, while it is."""
        if self._map is None:
            raise Closed(f"arena {self.number} is closed")
        if not 0 <= slot.index < self.count:
            raise ProtocolError(f"slot {slot.index} of an arena with {self.count}")
        granules = self._table[2 * slot.index + 1]
        generation = self._table[2 * slot.index]
        if not granules or generation != slot.generation:
            raise StaleSlot(
                f"slot {slot.index} of arena {self.number} is at generation {generation}, "
                f"the reference at {slot.generation}"
            )
        return granules

    def read(self, slot: Slot, nbytes: int) -> bytes:
        """A copy of *slot*, checked before and after."""
        data = bytes(self.view(slot, nbytes))
        self.check(slot)
        return data

    def close(self) -> None:
        """Unmap and close. Views still alive keep the memory mapped until they go."""
        if self._map is None:
            return
        self._table.release()
        self._memory.release()
        self._unmap()
        os.close(self.fd)

    def _unmap(self) -> None:
        if self._map is None:
            return
        mapping, self._map = self._map, None
        try:
            mapping.close()
        except BufferError:
            pass  # a view is alive; the mapping ends with it


class OwnArena(Arena):
    """An arena this process leases slots of."""

    def __init__(self, number: int, fd: int) -> None:
        """As Arena. Raises ProtocolError also where its table tells of slots that do not fit."""
        super().__init__(number, fd, writable=True)
        self.leases: dict[int, Lease] = {}
        self.zone: str | None = None  # who may map it besides the server; see Pool
        self.free = FreeList()  # of granules
        try:
            self._settle()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, nbytes: int, name: str) -> Self:
        """A new arena with room for *nbytes* in one slot; `number` is 0 until it is registered."""
        count = granules_for(nbytes)
        fd = shared.create(total_size(count), name)
        header = HEADER.pack(MAGIC, GRANULE, count, data_offset(count))
        os.pwrite(fd, header, 0)
        return cls(0, fd)

    def _settle(self) -> None:
        """Read the free pieces off the table: all of a new arena, the gaps of an adopted one."""
        place = 0
        while place < self.count:
            entry = self._table[2 * place + 1]
            granules = entry & ~FILLING
            if entry == 0:
                start = place
                while place < self.count and not self._table[2 * place + 1]:
                    place += 1
                self.free.give(start, place - start)
            elif not granules or place + granules > self.count:
                raise ProtocolError(
                    f"slot {place} of {granules} granules, in an arena of {self.count}: its table is "
                    "damaged"
                )
            else:
                place += granules

    @property
    def capacity(self) -> int:
        return self.count * GRANULE

    @property
    def largest_free(self) -> int:
        """Bytes of the largest slot that could be leased now."""
        return self.free.largest * GRANULE

    @property
    def used(self) -> int:
        return self.capacity - self.free.total * GRANULE

    def lease(self, nbytes: int, holder: int) -> Lease | None:
        """A slot of *nbytes* for *holder*, or None where no free piece is large enough."""
        if self._map is None:
            raise Closed(f"arena {self.number} is closed")
        need = granules_for(nbytes)
        start = self.free.take(need)
        if start is None:
            return None
        return self._grant(start, need, nbytes, holder)

    def _grant(self, start: int, granules: int, nbytes: int, holder: int) -> Lease:
        generation = (self._table[2 * start] + 1) & 0xFFFFFFFF
        self._table[2 * start] = generation
        self._table[2 * start + 1] = granules
        slot = Slot(self.number, start, generation)
        begin = self._data + start * GRANULE
        lease = Lease(slot, self._memory[begin : begin + nbytes], holder)
        self.leases[start] = lease
        return lease

    def filling(self, slot: Slot) -> None:
        """From now on *slot* is read by nobody, until it is `filled`."""
        self._table[2 * slot.index + 1] |= FILLING

    def filled(self, slot: Slot) -> None:
        """*slot* may be read; nothing where it has been given back meanwhile."""
        if self._table[2 * slot.index] == slot.generation:
            self._table[2 * slot.index + 1] &= ~FILLING

    def adopt(self, slot: Slot, nbytes: int, holder: int) -> Lease:
        """Take over a slot that a predecessor leased. Raises StaleSlot if it is another's now, OnDevice
        if it was never filled."""
        lease = Lease(slot, self.view(slot, nbytes), holder)
        self.leases[slot.index] = lease
        return lease

    def give_back(self, slot: Slot) -> None:
        """End the lease of *slot*. Raises StaleSlot if it has ended already."""
        self.check(slot)
        self.leases.pop(slot.index, None)
        start = slot.index
        granules = self._table[2 * start + 1] & ~FILLING
        # A reader in mid-copy sees this before the slot is anybody else's.
        self._table[2 * start] = (slot.generation + 1) & 0xFFFFFFFF
        self._table[2 * start + 1] = 0
        self.free.give(start, granules)

    def sweep_unleased(self) -> int:
        """After adopting: give back every slot that nobody took over. Returns how many."""
        place, swept = 0, 0
        while place < self.count:
            granules = self._table[2 * place + 1] & ~FILLING
            if granules and place not in self.leases:
                self.give_back(Slot(self.number, place, self._table[2 * place]))
                swept += 1
            place += max(granules, 1)
        return swept


class Pool:
    """Slots from as many own arenas as a limit allows; the next arena is made when it is needed.

    An arena holds slots of one zone alone, that of its first: those who may map it see all of it.
    """

    def __init__(
        self,
        limit: int,
        arena_nbytes: int,
        register: Callable[[OwnArena], int],
        name: str,
        retire: Callable[[OwnArena], None] | None = None,
    ) -> None:
        """limit, arena_nbytes: bytes. register: makes an arena known to the server, returns its
        number. name: shows in /proc/PID/maps. retire: the opposite of register, where arenas may be
        given up for ones of another zone."""
        self.limit = limit
        self.arenas: dict[int, OwnArena] = {}
        self.coming = 0  # bytes of arenas that are being made elsewhere, to be added
        self.arena_nbytes = min(arena_nbytes, limit)
        self._register = register
        self._name = name
        self._retire = retire

    @property
    def mapped(self) -> int:
        return sum(arena.capacity for arena in self.arenas.values())

    @property
    def used(self) -> int:
        return sum(arena.used for arena in self.arenas.values())

    def lease(self, nbytes: int, holder: int, *, zone: str = "") -> Lease:
        """A slot of *nbytes* for *holder*. Raises ArenaFull with what was asked, free and allowed."""
        arena = self._with_room(nbytes, zone) or self.grow(nbytes, zone)
        arena.zone = zone
        lease = arena.lease(nbytes, holder)
        assert lease is not None
        return lease

    def ready(self, nbytes: int, zone: str = "") -> bool:
        """Can a slot of *nbytes* be leased without one more arena?"""
        return self._with_room(nbytes, zone) is not None

    def _with_room(self, nbytes: int, zone: str) -> OwnArena | None:
        """The first arena with a free piece that long, of *zone* or of none yet."""
        need = granules_for(nbytes)
        for arena in self.arenas.values():  # there may be hundreds, most of them full
            if arena.free.largest >= need and arena.zone in (zone, None):
                return arena
        return None

    def may_grow(self, nbytes: int, zone: str = "") -> int:
        """Bytes of the arena that would be made for a slot of *nbytes*; 0: the limit allows none.
        Gives up empty ones for it: of other zones, and those that are too small."""
        room = self.limit - self.mapped - self.coming
        empty = self._empty(nbytes, zone)
        if nbytes > room + sum(one.capacity for one in empty):
            return 0
        for one in empty:
            if room >= max(nbytes, self.arena_nbytes):
                break
            assert self._retire is not None
            self._retire(self.arenas.pop(one.number))
            one.close()
            room += one.capacity
        return max(nbytes, min(self.arena_nbytes, room))

    def _empty(self, nbytes: int, zone: str) -> list[OwnArena]:
        """Arenas that hold nothing, and will not hold a slot of *nbytes* of *zone* either."""
        return [
            one
            for one in self.arenas.values()
            if self._retire is not None
            and not one.used
            and (one.zone not in (zone, None) or one.capacity < nbytes)
        ]

    def _of(self, zone: str) -> list[OwnArena]:
        return [one for one in self.arenas.values() if one.zone in (zone, None)]

    def free(self, zone: str) -> int:
        """Bytes that can be leased without one more arena, in pieces."""
        return sum(arena.capacity - arena.used for arena in self._of(zone))

    def _largest(self, zone: str) -> int:
        return max((arena.largest_free for arena in self._of(zone)), default=0)

    def full(self, nbytes: int, zone: str = "") -> ArenaFull:
        if nbytes > self.limit:
            return ArenaFull(
                f"{format_bytes(nbytes)} of host memory asked: the limit of all of it is "
                f"{format_bytes(self.limit)}; serve with more --host-memory"
            )
        room = self.limit - self.mapped
        # A limit that ends within a granule is passed by the rest of it.
        free = max(0, self.limit - self.used)
        return ArenaFull(
            f"{format_bytes(nbytes)} of host memory asked, "
            f"{format_bytes(max(self._largest(zone), room))} free in one piece, {format_bytes(free)} free in all, limit "
            f"{format_bytes(self.limit)}: release checkpoints and logits, or serve with more --host-memory"
        )

    def grow(self, nbytes: int, zone: str = "") -> OwnArena:
        """One more arena, with room for *nbytes* in one piece. Raises ArenaFull beyond the limit."""
        size = self.may_grow(nbytes, zone)
        if not size:
            raise self.full(nbytes, zone)
        return self.add(self.make(size))

    def make(self, nbytes: int) -> OwnArena:
        """A new arena, nobody's yet. May be called in another thread: its pages take a while."""
        return OwnArena.create(nbytes, self._name)

    def add(self, arena: OwnArena) -> OwnArena:
        """What `make` gave becomes one of the pool's."""
        try:
            arena.number = self._register(arena)
        except BaseException:
            arena.close()
            raise
        self.arenas[arena.number] = arena
        return arena

    def give_back(self, slot: Slot) -> None:
        """End the lease of *slot*. Raises StaleSlot if it has ended already."""
        arena = self.arenas.get(slot.arena)
        if arena is None:
            raise StaleSlot(f"arena {slot.arena} is not one of this pool")
        arena.give_back(slot)

    def reclaim(self, holder: int) -> int:
        """Give back all that *holder* has. Returns how many slots came back."""
        leases = [lease for arena in self.arenas.values() for lease in arena.leases.values()]
        gone = [lease.slot for lease in leases if lease.holder == holder]
        for slot in gone:
            self.give_back(slot)
        return len(gone)

    def close(self) -> None:
        for arena in self.arenas.values():
            arena.leases.clear()
            arena.close()
        self.arenas.clear()
