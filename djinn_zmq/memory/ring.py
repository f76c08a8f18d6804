"""A ring of records in shared memory: one process writes, one other reads, nobody waits here.

    0        64       128      192                                  192 + capacity
    ┌────────┬────────┬────────┬──────────┬──────────┬─────────────┐
    │ head   │ tail   │ waiting│ record   │ record   │ ...         │
    └────────┴────────┴────────┴──────────┴──────────┴─────────────┘
      u64      u64      u64      u32 nbytes, u32 kind, the bytes, padding to 8

`head` counts all bytes ever written, `tail` all bytes ever taken, so their difference is what is
there; each has one writer and a cache line of its own. A record's bytes may go round the end. A
record is published by raising `head` after its bytes are written; whoever rings the other side's
bell after that (see `bus.lane`) makes the kernel order the two for it. `waiting` says that the
writer found no room and wants to be told of some.

The other side may lie: each end counts for itself, checks what it reads of the other's counts, and
copies a record out before anybody looks at it.
"""

import platform
import struct
import threading

from djinn_zmq.errors import ProtocolError

HEAD, TAIL, WAITING = 0, 8, 16  # indices of u64 words, a cache line apart
CONTROL = 192  # bytes
RECORD = struct.Struct("<II")
HEAD_SIZE = RECORD.size

# x86 shows stores to others in the order they were made, and loads what it loads in order. Elsewhere
# the count could be seen before the bytes: there a lock's release and acquire keep them apart.
_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
_unpack = RECORD.unpack_from
_barrier = threading.Lock()
_barrier.acquire()


def _keep_order() -> None:
    _barrier.release()
    _barrier.acquire()


def size_of(capacity: int) -> int:
    """Bytes of memory for a ring with room for *capacity* bytes, a multiple of 8."""
    return CONTROL + capacity


class _End:
    """What both ends have: the counts, and the bytes between them."""

    def __init__(self, memory: memoryview) -> None:
        """memory: writable, of `size_of(capacity)` bytes, zeroed when the ring was made."""
        self.capacity = len(memory) - CONTROL
        control = memory[:CONTROL]
        self._words: memoryview[int] = control.cast("Q")
        control.release()
        self._data = memory[CONTROL:]

    def close(self) -> None:
        self._words.release()
        self._data.release()


class Writer(_End):
    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._head = self._words[HEAD]

    def put(self, record: bytes) -> bool:
        """Write a *record*, which begins with its packed header, and publish it. False where there
        is no room for it now.

        Raises ProtocolError where the reader claims to have taken what was never written.
        """
        head, capacity = self._head, self.capacity
        used = head - self._words[TAIL]
        step = len(record) + 7 & ~7
        if not 0 <= used <= capacity - step:
            if not 0 <= used <= capacity:
                raise ProtocolError(f"the ring's reader claims {used} of {capacity} bytes are used")
            return False
        place = head % capacity
        end = place + len(record)
        if end <= capacity:
            self._data[place:end] = record
        else:
            self._data[place:] = record[: capacity - place]
            self._data[: end - capacity] = record[capacity - place :]
        if not _ORDERED:
            _keep_order()
        self._words[HEAD] = self._head = head + step
        return True

    def ask_for_room(self) -> None:
        """Have the reader ring when it has taken something. Ring its bell after this call."""
        self._words[WAITING] = 1


class Reader(_End):
    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._tail = self._words[TAIL]

    def unfinished(self) -> bool:
        """Is there anything to take, or the writer to be told of room?"""
        words = self._words
        return words[HEAD] != self._tail or words[WAITING] != 0

    def take(self) -> tuple[int, bytes] | None:
        """(kind, bytes) of the next record, copied out; None where there is none.

        Raises ProtocolError for counts or a length that cannot be.
        """
        tail, capacity = self._tail, self.capacity
        there = self._words[HEAD] - tail
        if not there:
            return None
        if not _ORDERED:
            _keep_order()
        place = tail % capacity  # own counts are multiples of 8: a header cannot lie outside
        nbytes, kind = _unpack(self._data, place)
        step = nbytes + 15 & ~7  # with the header
        if not step <= there <= capacity:
            raise ProtocolError(
                f"a record of {nbytes} bytes where {there} are said to be there, in a ring of "
                f"{capacity}"
            )
        place += HEAD_SIZE
        end = place + nbytes
        if end <= capacity:
            data = bytes(self._data[place:end])
        else:
            data = bytes(self._data[place:]) + bytes(self._data[: end - capacity])
        self._words[TAIL] = self._tail = tail + step
        return kind, data

    def room_wanted(self) -> bool:
        """Does the writer wait to be told of room? Yes once: tell it then."""
        if self._words[WAITING]:
            self._words[WAITING] = 0
            return True
        return False
