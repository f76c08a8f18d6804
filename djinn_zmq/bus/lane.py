"""The lane: messages between two processes through shared memory, with a doorbell each way.

    first ── ring ──> second        two rings in one sealed memfd (`memory.ring`)
    first <── ring ── second
    an eventfd each: rung after writing, and after taking where the writer waits for room

Nobody waits here. What finds no room stays in a bounded backlog that `flush` empties when the other
side has rung. Every notice passes through the kernel, which orders it behind the bytes it is about,
so no flags are raced for; and a bell that nobody sleeps on costs 0.4 us.

    record, first of a message    kind = pieces, u32 length of each piece, then their bytes
    record, one that goes on      kind = MORE as well where others follow; CONTINUED where it is one

Messages are lists of pieces; what a piece is, the user of the lane knows. Between a client and an
engine it is a header with its meta, then the buffers; `bus.link` puts an envelope in front.
"""

import contextlib
import os
import select
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

from djinn_zmq.errors import Busy, ProtocolError
from djinn_zmq.memory import ring, shared
from djinn_zmq.memory.ring import RECORD
from djinn_zmq.settings import KIB, MIB, Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT

CAPACITY = 256 * KIB  # bytes of each ring between a client and an engine: bulk goes in slots
LINK_CAPACITY = 4 * MIB  # and between server and engine, where frames of 1 MiB pass
MORE = 1 << 31
CONTINUED = 1 << 30
PIECES_LIMIT = BUFFERS_LIMIT + 2  # an envelope, a header with its meta, buffers

Piece = bytes | memoryview
_ring_bell = os.eventfd_write

_records = [struct.Struct(f"<II{count}I") for count in range(PIECES_LIMIT + 1)]
_lengths = [struct.Struct(f"<{count}I") for count in range(PIECES_LIMIT + 1)]


class Ends(NamedTuple):
    """The descriptors of a lane, to be handed to the other process. Not inherited by itself.

    bell_first, bell_second: the eventfds that the first and the second end listen to.
    """

    memory: int
    bell_first: int
    bell_second: int

    def close(self) -> None:
        for fd in self:
            os.close(fd)


def create(capacity: int) -> Ends:
    """A new lane with two rings of *capacity* bytes (a multiple of 8). Raises ArenaFull."""
    memory = shared.create(2 * ring.size_of(capacity), "lane")
    flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
    return Ends(memory, os.eventfd(0, flags), os.eventfd(0, flags))


class Lane:
    """One end of a lane. Belongs to one thread."""

    def __init__(self, ends: Ends, settings: Settings, *, first: bool) -> None:
        """Take over *ends*: closed by `close`, and here where this raises.

        Raises ProtocolError where they are not what `create` makes.
        """
        self._ends = ends
        self._map = None
        try:
            nbytes = shared.sealed_size(ends.memory)
            if nbytes % 16 or not 2 * ring.size_of(KIB) <= nbytes <= 2 * ring.size_of(64 * MIB):
                raise ProtocolError(f"{nbytes} bytes of shared memory are no lane")
            for bell in ends[1:]:
                _check_bell(bell)
            self._map = shared.mapped(ends.memory, nbytes, writable=True)
        except BaseException:
            ends.close()
            raise
        self._memory = memoryview(self._map)
        there, back = self._memory[: nbytes // 2], self._memory[nbytes // 2 :]
        self._out = ring.Writer(there if first else back)
        self._in = ring.Reader(back if first else there)
        # Is there more to be done here than the bell says?
        self.unfinished: Callable[[], bool] = self._in.unfinished
        there.release()
        back.release()
        self._own_bell, self._their_bell = ends[1:] if first else ends[:0:-1]
        self._fragment = self._out.capacity // 4
        self._frame_limit = settings.frame_limit
        self._high_water = settings.high_water
        self._backlog: deque[bytes] = deque()
        self._coming: list[bytes] = []  # records of a message that is not whole yet
        self.unrung = False  # something was sent, and the bell left for later
        self.closed = False

    @classmethod
    def create(cls, capacity: int, settings: Settings) -> tuple[Self, Ends]:
        """The first end, and what the other process makes the second of; ours to close."""
        ends = create(capacity)
        theirs = Ends(*(os.dup(fd) for fd in ends))
        try:
            return cls(ends, settings, first=True), theirs
        except BaseException:
            theirs.close()
            raise

    def fileno(self) -> int:
        """The bell this end listens to. Never read but by `hush`: wait for it edge-triggered."""
        return self._own_bell

    def hush(self) -> None:
        """Take the rings so far off the bell, for who waits for its level."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._own_bell)

    # ---- sending

    def send(self, pieces: Sequence[Piece], ring: bool = True) -> None:
        """Pass a message on, now or when there is room. Never waits.

        ring: False leaves the bell to the next `send`, or to `ring`: the other side is not woken yet.
        Raises Busy where the backlog is full, ProtocolError where the other side lies about room.
        """
        count = len(pieces)
        lengths = list(map(len, pieces))
        nbytes = 4 * count + sum(lengths)
        if self._backlog or nbytes > self._fragment:
            self._put_back(count, b"".join((_lengths[count].pack(*lengths), *pieces)))
            return
        record = b"".join((_records[count].pack(nbytes, count, *lengths), *pieces))
        if not self._out.put(record):
            self._put_back(count, record[RECORD.size :])
            return
        self.unrung = not ring
        if ring:
            try:
                _ring_bell(self._their_bell, 1)
            except BlockingIOError:
                pass  # its count is full, by whatever mischief: it is being rung already

    def _put_back(self, count: int, whole: bytes) -> None:
        if len(self._backlog) > self._high_water:
            raise Busy("the queue of the lane is full: its other end does not read")
        self._backlog.extend(self._in_records(count, whole))
        self.flush()

    def _in_records(self, count: int, whole: bytes) -> Iterator[bytes]:
        for at in range(0, len(whole), self._fragment):
            data = whole[at : at + self._fragment]
            kind = CONTINUED if at else count
            if at + self._fragment < len(whole):
                kind |= MORE
            yield RECORD.pack(len(data), kind) + data

    def flush(self) -> bool:
        """Write as much of the backlog as there is room for. True where nothing is left of it."""
        if not self._backlog:
            return True
        while self._backlog and self._out.put(self._backlog[0]):
            self._backlog.popleft()
        if self._backlog:
            self._out.ask_for_room()
        self.ring()
        return not self._backlog

    def ring(self) -> None:
        """Have the other side look at what was sent."""
        self.unrung = False
        with contextlib.suppress(BlockingIOError):
            _ring_bell(self._their_bell, 1)

    # ---- receiving

    def receive(self) -> list[Piece] | None:
        """The next message, or None when there is no whole one now. Its bytes are the caller's own.

        Raises ProtocolError for what is no message; the lane is of no use after that.
        """
        while (record := self._in.take()) is not None:
            kind, data = record
            if 0 < kind <= PIECES_LIMIT and not self._coming:  # whole, as most are
                return _pieces(kind, data)
            whole = self._collect(kind, data)
            if whole is not None:
                return _pieces(self._count, whole)
        if self._in.room_wanted():
            self.ring()
        if self._backlog:  # the bell may have told of room
            self.flush()
        return None

    def _collect(self, kind: int, data: bytes) -> bytes | None:
        """One more record of a message in several; the message, where it is now whole."""
        if bool(kind & CONTINUED) != bool(self._coming):
            raise ProtocolError("a record out of turn: messages in several records are not mixed")
        if not self._coming:
            self._count = kind & ~MORE
            # Checked with the first record: what is too large is never collected.
            if not 0 < self._count <= PIECES_LIMIT or len(data) < 4 * self._count:
                raise ProtocolError(f"a message of {self._count} pieces: 1 to {PIECES_LIMIT}")
            lengths = _lengths[self._count].unpack_from(data)
            if max(lengths) > self._frame_limit:
                raise ProtocolError(f"a piece of {max(lengths)} bytes: at most {self._frame_limit}")
            self._missing = 4 * self._count + sum(lengths)
        self._coming.append(data)
        self._missing -= len(data)
        if (self._missing > 0) != bool(kind & MORE):
            raise ProtocolError("a message ends before its last record, or after it")
        if kind & MORE:
            return None
        whole = b"".join(self._coming)
        self._coming.clear()
        return whole

    def close(self) -> None:
        """Unmap and close. What was sent and not yet taken stays there for the other end."""
        if self.closed:
            return
        self.closed = True
        self.unfinished = lambda: False
        self._backlog.clear()
        self._out.close()
        self._in.close()
        self._memory.release()
        if self._map is not None:
            self._map.close()
        self._ends.close()


def _pieces(count: int, data: bytes) -> list[Piece]:
    """A whole message, taken apart."""
    if count == 2 and len(data) >= 8:  # an envelope and a header: most messages between processes
        first, second = _lengths[2].unpack_from(data)
        if 8 + first + second == len(data):
            return [data[8 : 8 + first], data[8 + first :]]
    pieces: list[Piece] = []
    source: Piece = data
    offset = 4 * count
    if len(data) < offset:
        raise ProtocolError(f"a message of {count} pieces in {len(data)} bytes")
    for length in _lengths[count].unpack_from(data):
        pieces.append(source[offset : offset + length])
        offset += length
        if len(pieces) == 2:  # an envelope and a header are to be looked up: bytes; then buffers
            source = memoryview(data)
    if offset != len(data):
        raise ProtocolError(f"a message of {offset} bytes in {len(data)}")
    return pieces


def _check_bell(fd: int) -> None:
    """Raises ProtocolError for a descriptor that is no eventfd that never waits."""
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]" or os.get_blocking(fd):
        raise ProtocolError("a bell of a lane must be an eventfd that does not wait")


def wait(lane: Lane, gone: int, timeout_s: float) -> bool:
    """Sleep until *lane* may have something, the descriptor *gone* is readable, or time is up.

    True where *gone* spoke. For an end without a `Poll`: reads the bell.
    """
    poll = select.poll()
    poll.register(gone, select.POLLIN)
    poll.register(lane.fileno(), select.POLLIN)
    ready = poll.poll(timeout_s * 1000)
    lane.hush()
    return any(fd == gone for fd, _ in ready)
