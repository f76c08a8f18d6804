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

import mmap
import platform
import threading

from djinn_zmq.errors import ProtocolError

HEAD, TAIL, WAITING = 0, 8, 16  # indices of u64 words, a cache line apart
CONTROL = 192  # bytes
RECORDS = CONTROL // 8  # index of the first u64 word behind it
HEAD_SIZE = 8  # of a record: one word, kind << 32 | nbytes

# x86 shows stores to others in the order they were made, and loads what it loads in order. Elsewhere
# the count could be seen before the bytes: there a lock's release and acquire keep them apart.
_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")


def size_of(capacity: int) -> int:
    """Bytes of memory for a ring with room for *capacity* bytes, a multiple of 8."""
    return CONTROL + capacity


class _End:
    """What both ends have: the counts, and the bytes between them."""

    def __init__(self, memory: mmap.mmap, begin: int, capacity: int) -> None:
        """memory: writable; its `size_of(capacity)` bytes from *begin* on, zeroed when the ring was
        made, are the ring's. The map itself, because a slice of it is bytes at once."""
        self.capacity = capacity
        with memoryview(memory) as whole, whole[begin : begin + size_of(capacity)] as ours:
            self._words: memoryview[int] = ours.cast("Q")
            self._heads: memoryview[int] = whole.cast("Q")  # of records, by their place in the map
        self._memory = memory
        self._first = begin + CONTROL  # where the records begin
        self._end = self._first + capacity
        self._place = self._first  # in the map, of the next record
        self._barrier = threading.Lock()  # its own: ends belong to different threads
        self._barrier.acquire()

    def _keep_order(self) -> None:
        self._barrier.release()
        self._barrier.acquire()

    def close(self) -> None:
        self._words.release()
        self._heads.release()


class Writer(_End):
    def __init__(self, memory: mmap.mmap, begin: int, capacity: int) -> None:
        super().__init__(memory, begin, capacity)
        self._head = 0  # whatever the other side has written there
        # Up to where there is room in one piece, as far as is known: most records need no more.
        self._until = self._first

    def put(self, kind: int, data: bytes) -> bool:
        """Write a record and publish it. False where there is no room for it now.

        Raises ProtocolError where it turns out that the reader claims to have taken what was never
        written.
        """
        place, nbytes = self._place, len(data)
        after = place + (nbytes + 15 & ~7)  # with the header
        if after > self._until:
            return self._put_behind(kind, data)
        self._heads[place >> 3] = kind << 32 | nbytes
        begin = place + HEAD_SIZE
        self._memory[begin : begin + nbytes] = data
        if not _ORDERED:
            self._keep_order()
        self._place = after
        self._words[HEAD] = self._head = self._head + after - place
        return True

    def _put_behind(self, kind: int, data: bytes) -> bool:
        """The same where room has to be looked for: behind what was taken since, and round the end."""
        head, capacity, nbytes = self._head, self.capacity, len(data)
        used = head - self._words[TAIL]
        if not 0 <= used <= capacity:
            raise ProtocolError(f"the ring's reader claims {used} of {capacity} bytes are used")
        step = nbytes + 15 & ~7
        if step > capacity - used:
            return False
        # Own counts are multiples of 8: a header cannot lie outside.
        place = self._place = self._first + head % capacity
        self._until = min(place + capacity - used, self._end)
        if place + step <= self._until:
            return self.put(kind, data)
        self._heads[place >> 3] = kind << 32 | nbytes
        begin = place + HEAD_SIZE
        before = min(nbytes, self._end - begin)
        self._memory[begin : begin + before] = data[:before]
        self._memory[self._first : self._first + nbytes - before] = data[before:]
        if not _ORDERED:
            self._keep_order()
        self._until = self._first  # known no more
        self._words[HEAD] = self._head = head + step
        return True

    def ask_for_room(self) -> None:
        """Have the reader ring when it has taken something. Ring its bell after this call."""
        self._words[WAITING] = 1


class Reader(_End):
    def __init__(self, memory: mmap.mmap, begin: int, capacity: int) -> None:
        super().__init__(memory, begin, capacity)
        self._tail = 0  # as above

    def unfinished(self) -> bool:
        """Is there anything to take, or the writer to be told of room?"""
        words = self._words
        return words[HEAD] != self._tail or words[WAITING] != 0

    def take(self) -> tuple[int, bytes] | None:
        """(kind, bytes) of the next record, copied out; None where there is none.

        Raises ProtocolError for counts or a length that cannot be.
        """
        tail, place = self._tail, self._place
        there = self._words[HEAD] - tail
        if not there:
            return None
        if not _ORDERED:
            self._keep_order()
        head = self._heads[place >> 3]
        nbytes = head & 0xFFFFFFFF
        step = nbytes + 15 & ~7
        if not step <= there <= self.capacity:
            raise ProtocolError(
                f"a record of {nbytes} bytes where {there} are said to be there, in a ring of "
                f"{self.capacity}"
            )
        begin = place + HEAD_SIZE
        if place + step < self._end:
            data = self._memory[begin : begin + nbytes]
            self._place = place + step
        else:
            data = self._memory[begin : min(begin + nbytes, self._end)]
            data += self._memory[self._first : self._first + nbytes - len(data)]
            self._place = self._first + (place + step - self._end)
        self._words[TAIL] = self._tail = tail + step
        return head >> 32, data

    def room_wanted(self) -> bool:
        """Does the writer wait to be told of room? Yes once: tell it then."""
        if self._words[WAITING]:
            self._words[WAITING] = 0
            return True
        return False
