"""The lane: messages between two processes through shared memory, with a doorbell each way.

    first ── ring ──> second        two rings in one sealed memfd (`memory.ring`)
    first <── ring ── second
    a bell each: rung after writing, and after taking where the writer waits for room

    second listens to   an eventfd that first makes and hands over with the memory
    first listens to    an epoll, handed over as well, into which second puts an eventfd that it makes for
                        itself, and gives to nobody

Whoever holds an eventfd can make it one that waits, for all who hold it, and fill it: the next ring would not
return. So an engine rings none that a client holds; the epoll in between costs it 0.2 us.

Nobody waits here. What finds no room stays in a bounded backlog that `flush` empties when the other side has
rung. Every notice passes through the kernel, which orders it behind the bytes it is about, so no flags are
raced for; and a bell that nobody sleeps on costs 0.4 us. To wake takes 10 us, after a while of idling 60: so the
bell is also rung ahead, where a message is certain to follow, and who is woken so finds nothing yet.

    record, a whole message     kind 0: a msgpack array [envelope, frame 0, [buffer, ...]]
    record, frame 0 alone       ALONE: it, of a message without envelope and buffers, as most are
    record, first of several    MORE: u64 nbytes of that array, then the beginning of it
    record, one that goes on    CONTINUED, with MORE where others follow: more of it

A message is a header with its meta (`wire.codec`), the buffers behind it, and an envelope in front: whose
it is. Between a client and an engine that is empty.
"""

import contextlib
import mmap
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

from djinn_zmq.errors import Busy, ProtocolError
from djinn_zmq.memory import ring, shared
from djinn_zmq.settings import KIB, MIB, Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT, Whole, join, split

CAPACITY = 256 * KIB  # bytes of each ring between a client and an engine: bulk goes in slots
LINK_CAPACITY = 4 * MIB  # and between server and engine, where frames of 1 MiB pass
MORE = 1 << 31
CONTINUED = 1 << 30
ALONE = 1 << 29
WHOLE = struct.Struct("<Q")
SOON_NS = 100_000  # how long to stay awake for who has rung ahead: a message is made in half of it
# For client, server, engine and whoever else computes. With fewer, who stays awake for one of them keeps
# another from running.
CPU_EACH = len(os.sched_getaffinity(0)) >= 4
# How often to look before giving way: for 20 us. Needed with many CPUs, too: where all are busy (torch's
# threads stay awake for a while after their work) who was rung runs in the place of who rang.
LOOKS = 64 if CPU_EACH else 1
BELL = os.EFD_NONBLOCK | os.EFD_CLOEXEC
EVENTFD, EPOLL = "anon_inode:[eventfd]", "anon_inode:[eventpoll]"  # what they are links to

Piece = bytes | memoryview

_ring_bell = os.eventfd_write


class Ends(NamedTuple):
    """The descriptors of a lane, to be handed to the other process. Not inherited by itself.

    bell_first, bell_second: what the first and the second end listen to, an epoll and an eventfd.
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
    made = [memory]
    try:
        with select.epoll() as bell:
            made.append(os.dup(bell.fileno()))
        made.append(os.eventfd(0, BELL))
    except BaseException:  # of descriptors there may be none left
        for fd in made:
            os.close(fd)
        raise
    return Ends(*made)


class Lane:
    """One end of a lane. Belongs to one thread."""

    def __init__(self, ends: Ends, settings: Settings, *, first: bool) -> None:
        """Take over *ends*: closed by `close`, and here where this raises.

        Raises ProtocolError where they are not what `create` makes.
        """
        self._ends = ends
        self._map: mmap.mmap | None = None
        self._epoll: select.epoll | None = None  # the first end's bell, which it owns
        try:
            nbytes = shared.sealed_size(ends.memory)
            if nbytes % 16 or not 2 * ring.size_of(KIB) <= nbytes <= 2 * ring.size_of(64 * MIB):
                raise ProtocolError(f"{nbytes} bytes of shared memory are no lane")
            _check_bell(ends.bell_first, EPOLL)
            _check_bell(ends.bell_second, EVENTFD)
            self._map = shared.mapped(ends.memory, nbytes, writable=True)
            if first:
                self._epoll = select.epoll.fromfd(ends.bell_first)
            else:
                self._ends = ends = _with_own_bell(ends)
        except BaseException:
            ends.close()
            raise
        capacity = nbytes // 2 - ring.CONTROL
        there, back = (0, nbytes // 2) if first else (nbytes // 2, 0)
        self._out = ring.Writer(self._map, there, capacity)
        self._in = ring.Reader(self._map, back, capacity)
        # Is there more to be done here than the bell says?
        self.unfinished: Callable[[], bool] = self._in.unfinished
        self._own_bell, self._their_bell = ends[1:] if first else ends[:0:-1]
        self._fragment = self._out.capacity // 4
        self._frame_limit = settings.frame_limit
        self._high_water = settings.high_water
        self._backlog: deque[tuple[int, bytes]] = deque()
        self._coming: list[bytes] = []  # records of a message that is not whole yet
        self.unrung = False  # something was sent, and the bell left for later
        self.closed = False

    @classmethod
    def create(cls, capacity: int, settings: Settings) -> tuple[Self, Ends]:
        """The first end, and what the other process makes the second of; ours to close."""
        ends = create(capacity)
        try:
            theirs = Ends(*shared.duplicates(ends))
        except BaseException:
            ends.close()
            raise
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
        if self._epoll is not None:
            self._epoll.poll(0, 1)  # what is edge-triggered is told once
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._own_bell)

    # ---- sending

    def send(
        self, envelope: bytes, frame: bytes, buffers: Sequence[Piece] = (), *, ring: bool = True
    ) -> None:
        """Pass a message on, now or when there is room. Never waits.

        ring: False leaves the bell to the next `send`, or to `ring`: the other side is not woken yet.
        Raises Busy where the backlog is full, ProtocolError where the other side lies about room.
        """
        kind, data = ALONE, frame
        if envelope or buffers or len(frame) > self._fragment:
            kind, data = 0, join((envelope, frame, buffers))
        if self._backlog or len(data) > self._fragment or not self._out.put(kind, data):
            self._put_back(kind, data)
            return
        self.unrung = not ring
        if ring:
            try:
                _ring_bell(self._their_bell, 1)
            except BlockingIOError:
                pass  # its count is full, by whatever mischief: it is being rung already

    def _put_back(self, kind: int, data: bytes) -> None:
        if len(self._backlog) > self._high_water:
            raise Busy("the queue of the lane is full: its other end does not read")
        self._backlog.extend(self._in_records(kind, data))
        self.flush()

    def queue(self, envelope: bytes, frame: bytes, buffers: Sequence[Piece] = ()) -> None:
        """The same as `send` however much waits already: for what is bounded by who says it."""
        self._backlog.extend(self._in_records(0, join((envelope, frame, buffers))))
        self.flush()

    def _in_records(self, kind: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        if len(data) <= self._fragment:
            yield kind, data
            return
        data = WHOLE.pack(len(data)) + data
        for at in range(0, len(data), self._fragment):
            kind = CONTINUED if at else 0
            if at + self._fragment < len(data):
                kind |= MORE
            yield kind, data[at : at + self._fragment]

    def flush(self) -> bool:
        """Write as much of the backlog as there is room for. True where nothing is left of it."""
        if not self._backlog:
            return True
        while self._backlog and self._out.put(*self._backlog[0]):
            self._backlog.popleft()
        if self._backlog:
            self._out.ask_for_room()
        self.ring()
        return not self._backlog

    def ring(self) -> None:
        """Have the other side look at what was sent, or wake for what is about to be."""
        self.unrung = False
        try:
            _ring_bell(self._their_bell, 1)
        except BlockingIOError:
            pass

    # ---- receiving

    def rung_ahead(self) -> bool:
        """Its bell has rung: for nothing that is there already, neither a message nor room?"""
        return not self._backlog and not self.unfinished()

    def comes(self, within_ns: int) -> bool:
        """Look again and again, until there is something or time is up."""
        unfinished, clock = self.unfinished, time.perf_counter_ns
        limit_ns = clock() + within_ns
        while clock() < limit_ns:
            for _ in range(LOOKS):
                if unfinished():
                    return True
            os.sched_yield()
        return False

    def receive(self) -> Whole | None:
        """The next message, or None when there is no whole one now. Its bytes are the caller's own.

        Raises ProtocolError for what is no message; the lane is of no use after that.
        """
        if self._backlog:  # the bell may have told of room
            self.flush()
        while (record := self._in.take()) is not None:
            kind, data = record
            if kind == ALONE and not self._coming:
                return b"", data, []
            if kind or self._coming:  # one of several, as few are
                whole = self._collect(kind, data)
                if whole is None:
                    continue
                return self._checked(split(whole))
            return split(data)
        if self._in.room_wanted():
            self.ring()
        return None

    def _collect(self, kind: int, data: bytes) -> bytes | None:
        """One more record of a message in several; the message, where it is now whole."""
        if kind & ~(MORE | CONTINUED) or bool(kind & CONTINUED) != bool(self._coming):
            raise ProtocolError("a record out of turn: messages in several records are not mixed")
        if kind & MORE and len(data) != self._fragment:  # crumbs would take minutes to collect
            raise ProtocolError(
                f"a record of {len(data)} bytes with others to follow: it has {self._fragment}"
            )
        if not self._coming:
            (self._missing,) = WHOLE.unpack_from(data)
            # Checked with the first record: what is too large is never collected.
            limit = (2 + BUFFERS_LIMIT) * self._frame_limit
            if self._missing > limit:
                raise ProtocolError(f"a message of {self._missing} bytes: at most {limit}")
            data = data[WHOLE.size :]
        self._coming.append(data)
        self._missing -= len(data)
        if (self._missing > 0) != bool(kind & MORE):
            raise ProtocolError("a message ends before its last record, or after it")
        if kind & MORE:
            return None
        whole = b"".join(self._coming)
        self._coming.clear()
        return whole

    def _checked(self, message: Whole) -> Whole:
        envelope, frame, buffers = message
        longest = max(map(len, (envelope, frame, *buffers)))
        if longest > self._frame_limit:
            raise ProtocolError(f"a piece of {longest} bytes: at most {self._frame_limit}")
        return message

    def close(self) -> None:
        """Unmap and close. What was sent and not yet taken stays there for the other end."""
        if self.closed:
            return
        self.closed = True
        self.unfinished = lambda: False
        self._backlog.clear()
        self._out.close()
        self._in.close()
        if self._map is not None:
            self._map.close()
        if self._epoll is None:
            self._ends.close()
        else:
            self._epoll.close()
            os.close(self._ends.memory)
            os.close(self._ends.bell_second)


def _check_bell(fd: int, kind: str) -> None:
    """Raises ProtocolError for a descriptor of another kind."""
    found = os.readlink(f"/proc/self/fd/{fd}")
    if found != kind:
        raise ProtocolError(f"a bell of a lane that is {found}: it must be {kind}")


def _with_own_bell(ends: Ends) -> Ends:
    """Have the first end hear of an eventfd of our own, which takes the place of its bell."""
    own = os.eventfd(0, BELL)
    try:
        with select.epoll.fromfd(os.dup(ends.bell_first)) as theirs:
            theirs.register(own, select.EPOLLIN | select.EPOLLET)
    except BaseException:
        os.close(own)
        raise
    os.close(ends.bell_first)
    return ends._replace(bell_first=own)
