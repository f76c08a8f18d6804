"""The lane: whole messages through shared memory, between processes that may die or lie."""

import dataclasses
import gc
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from djinn_zmq.bus.lane import ALONE, CONTINUED, MORE, WHOLE, Ends, Lane, create
from djinn_zmq.errors import Busy, ProtocolError
from djinn_zmq.memory import shared
from djinn_zmq.memory.ring import size_of
from djinn_zmq.settings import KIB, MIB, Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT
from tests.bus.conftest import WAIT_S, wait

CAPACITY = 64 * KIB
SHALLOW = dataclasses.replace(Settings(), high_water=4)

ECHO = """
import select, sys
from djinn_zmq.bus.lane import Ends, Lane
from djinn_zmq.settings import Settings
lane = Lane(Ends(*map(int, sys.argv[1:4])), Settings(), first=False)
poll = select.poll()
poll.register(lane.fileno(), select.POLLIN)
while True:
    while (pieces := lane.receive()) is not None:
        lane.send(*pieces)
    poll.poll()
    lane.hush()
"""


@pytest.fixture
def lanes() -> Iterator[tuple[Lane, Lane]]:
    first, theirs = Lane.create(CAPACITY, SHALLOW)
    second = Lane(theirs, SHALLOW, first=False)
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def echo() -> Iterator[tuple[Lane, "subprocess.Popen[bytes]"]]:
    """A lane to another process, which sends back what it gets."""
    lane, theirs = Lane.create(CAPACITY, Settings())
    process = subprocess.Popen(
        [sys.executable, "-c", ECHO, *map(str, theirs)],
        stdin=subprocess.PIPE,
        pass_fds=theirs,
        cwd=Path(__file__).parents[2],
    )
    theirs.close()
    yield lane, process
    lane.close()
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def rang(lane: Lane) -> bool:
    """Has the other end rung since the last look?"""
    poll = select.poll()
    poll.register(lane.fileno(), select.POLLIN)
    found = bool(poll.poll(0))
    lane.hush()
    return found


def arrives(lane: Lane) -> tuple[bytes, bytes, list[bytes]]:
    """The next message; waits for it."""
    read, write = os.pipe()
    try:
        while (message := lane.receive()) is None:
            assert not wait(lane, read, WAIT_S)
    finally:
        os.close(read)
        os.close(write)
    envelope, frame, buffers = message
    assert type(envelope) is bytes and type(frame) is bytes  # to be looked up
    return envelope, frame, [bytes(buffer) for buffer in buffers]


# Of the frame, then of each buffer.
SIZES = [(0,), (3, 0), (80, 5), (1, 2, 3), (CAPACITY, 7), (10, MIB, 64 * KIB)]
SIZES += [(1,) * (1 + BUFFERS_LIMIT)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_message_comes_back_from_another_process_as_it_was_sent(
    echo: tuple[Lane, "subprocess.Popen[bytes]"], sizes: tuple[int, ...]
) -> None:
    lane, _ = echo
    frame, *buffers = [bytes([place + 1]) * size for place, size in enumerate(sizes)]
    for envelope in (b"", b"i\0route", b""):  # goes round the end
        lane.send(envelope, frame, [memoryview(buffer) for buffer in buffers])
        assert arrives(lane) == (envelope, frame, buffers)


def test_ten_thousand_messages_in_flight_keep_their_order(
    echo: tuple[Lane, "subprocess.Popen[bytes]"],
) -> None:
    lane, _ = echo
    sent, received = 0, 0
    while received < 10_000:
        while sent < 10_000 and sent - received < 500:
            lane.send(struct.pack("<I", sent), b"x" * (sent % 700))
            sent += 1
        number, frame, _ = arrives(lane)
        assert (number, len(frame)) == (struct.pack("<I", received), received % 700)
        received += 1


def test_every_message_rings_the_other_end(lanes: tuple[Lane, Lane]) -> None:
    first, second = lanes
    for one, other in ((first, second), (second, first)):
        assert not rang(other)
        one.send(b"", b"hello")
        assert rang(other)
        assert not rang(one)
        assert other.receive() == (b"", b"hello", [])


def test_what_finds_no_room_follows_when_there_is_some(lanes: tuple[Lane, Lane]) -> None:
    first, second = lanes
    big = bytes(CAPACITY // 8)
    for number in range(12):
        first.send(bytes([number]), big)
    assert not first.flush()
    rang(first)
    taken = []
    while len(taken) < 12:
        message = second.receive()
        if message is None:
            assert rang(first), "who waits for room is not told of it"
            first.flush()
        else:
            taken.append(message[0])
    assert taken == [bytes([number]) for number in range(12)]
    assert first.flush()


def test_a_ring_that_tells_of_a_message_and_of_room_at_once_is_used_for_both(
    lanes: tuple[Lane, Lane],
) -> None:
    first, second = lanes
    for number in range(12):
        first.send(bytes([number]), bytes(CAPACITY // 8))
    taken = []
    while (message := second.receive()) is not None:
        taken.append(message[0])
    second.send(b"", b"and a message")
    assert rang(first)
    assert first.receive() == (b"", b"and a message", [])  # who has taken it may sleep now
    while (message := second.receive()) is not None:
        taken.append(message[0])
    assert taken == [bytes([number]) for number in range(12)]


def test_an_end_that_does_not_read_makes_busy_and_loses_nothing(lanes: tuple[Lane, Lane]) -> None:
    first, second = lanes
    sent = 0
    with pytest.raises(Busy, match="its other end does not read"):
        while sent < 1000:
            first.send(b"%d" % sent, bytes(CAPACITY // 2))
            sent += 1
    assert sent < 10
    taken = 0
    while taken < sent:
        message = second.receive()
        if message is None:
            first.flush()
        else:
            assert message[0] == b"%d" % taken
            taken += 1


def test_what_a_process_sent_before_it_was_killed_is_still_there(
    echo: tuple[Lane, "subprocess.Popen[bytes]"],
) -> None:
    lane, process = echo
    lane.send(b"", b"last words")
    assert not wait(lane, process.stdin.fileno(), WAIT_S)  # type: ignore[union-attr]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lane.receive() == (b"", b"last words", [])
    assert lane.receive() is None
    for _ in range(3):
        lane.send(b"", b"to nobody")  # the lease socket tells of the death, not the lane


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (0, b""),
        (0, b"\x90"),
        (0, b"\x92\xc4\0\xc4\0"),  # no buffers, not even none
        (0, b"\x93\xc4\0\xc4\0\xc4\0"),
        (0, b"\x93\xc4\0\xc4\0\x91\xa1x"),  # text
        (0, b"\x93\xc4\0\xc4\0\x91\xc6\xff\xff\xff\xffx"),  # a buffer that is cut off
        (0, b"\x93\xc4\0\xc4\0\xdd\xff\xff\xff\xff"),
        (0, b"\x93\xc4\0\xc4\0\x90x"),  # something behind
        (
            0,
            b"\x93\xc4\0\xc4\0\xdc\0"
            + bytes([BUFFERS_LIMIT + 1])
            + b"\xc4\0" * (BUFFERS_LIMIT + 1),
        ),
        (1, b"\x93\xc4\0\xc4\0\x90"),
        (CONTINUED, b"out of turn"),
        (MORE, b"\1\0\0\0x"),
        (MORE, WHOLE.pack(1) + b"x"),
        (MORE, WHOLE.pack(2**64 - 1) + b"x"),
        (MORE | 1, WHOLE.pack(CAPACITY) + b"x"),
        (2**32 - 1, b"x"),
        (ALONE | 1, b"x"),
        (ALONE | MORE, WHOLE.pack(CAPACITY) + b"x"),
        (ALONE | CONTINUED, b"x"),
    ],
)
def test_records_that_are_no_message_are_refused(
    lanes: tuple[Lane, Lane], kind: int, data: bytes
) -> None:
    first, second = lanes
    assert first._out.put(kind, data)
    with pytest.raises(ProtocolError):
        second.receive()


def test_a_message_that_never_ends_is_refused_before_it_is_collected(
    lanes: tuple[Lane, Lane],
) -> None:
    first, second = lanes
    whole = WHOLE.pack(CAPACITY // 2 - WHOLE.size) + bytes(CAPACITY // 2 - WHOLE.size)
    for kind, data in (MORE, whole[: CAPACITY // 4]), (MORE | CONTINUED, whole[CAPACITY // 4 :]):
        assert first._out.put(kind, data)
    with pytest.raises(ProtocolError, match="ends before its last record, or after it"):
        second.receive()


def test_a_frame_alone_is_a_record_as_it_is_and_never_among_those_of_another_message(
    lanes: tuple[Lane, Lane],
) -> None:
    first, second = lanes
    first.send(b"", b"frame")
    assert second._in.take() == (ALONE, b"frame")
    first.send(b"", bytes(CAPACITY // 4))
    assert second.receive() == (b"", bytes(CAPACITY // 4), [])
    first.send(b"", bytes(CAPACITY // 4 + 1))  # too long for one record
    while (message := second.receive()) is None:
        first.flush()
    assert message == (b"", bytes(CAPACITY // 4 + 1), [])
    part = (WHOLE.pack(CAPACITY) + bytes(CAPACITY))[: CAPACITY // 4]
    assert first._out.put(MORE, part) and first._out.put(ALONE, b"frame")
    with pytest.raises(ProtocolError, match="out of turn"):
        second.receive()


def test_a_message_in_crumbs_is_refused(lanes: tuple[Lane, Lane]) -> None:
    first, second = lanes
    assert first._out.put(MORE, WHOLE.pack(CAPACITY) + b"x")
    with pytest.raises(ProtocolError, match=f"a record of 9 bytes .* it has {CAPACITY // 4}"):
        second.receive()


def test_a_piece_beyond_the_limit_of_frames_is_refused() -> None:
    small = dataclasses.replace(Settings(), frame_limit=CAPACITY // 2)
    first, theirs = Lane.create(CAPACITY, Settings())
    second = Lane(theirs, small, first=False)
    first.send(b"", b"frame", [bytes(CAPACITY)])
    with pytest.raises(
        ProtocolError, match=f"a piece of {CAPACITY} bytes: at most {CAPACITY // 2}"
    ):
        while second.receive() is None:
            first.flush()
    first.close()
    second.close()


def test_a_bell_that_is_full_still_rings(lanes: tuple[Lane, Lane]) -> None:
    first, second = lanes
    os.eventfd_write(second.fileno(), 2**64 - 2)
    first.send(b"", b"one more")
    assert rang(second)
    assert second.receive() == (b"", b"one more", [])


def test_nothing_that_is_done_to_its_bell_makes_the_other_end_wait(
    lanes: tuple[Lane, Lane],
) -> None:
    first, second = lanes
    for fd in first._ends:  # all that it has of the lane
        os.set_blocking(fd, True)
        with suppress(OSError):
            os.eventfd_write(fd, 2**64 - 2)
    ringing = threading.Thread(target=second.send, args=(b"", b"answer"), daemon=True)
    ringing.start()
    ringing.join(WAIT_S)
    assert not ringing.is_alive()
    assert first.receive() == (b"", b"answer", [])


def _ends(nbytes: int, **other: int) -> Ends:
    """Of a lane, but for its memory, and what is named."""
    memory, first, second = create(CAPACITY)
    os.close(memory)
    ends = Ends(shared.create(nbytes, "test"), first, second)
    for name, fd in other.items():
        os.close(getattr(ends, name))
        ends = ends._replace(**{name: fd})
    return ends


def test_what_is_no_lane_is_refused_and_closed() -> None:
    pipe, other = os.pipe()
    os.close(other)
    nbytes = 2 * size_of(CAPACITY)
    for ends in (
        _ends(nbytes, bell_second=pipe),  # would not ring
        _ends(nbytes, bell_first=os.eventfd(0)),  # would make an engine wait
        _ends(100),
        _ends(nbytes + 8),
        _ends(nbytes, memory=os.memfd_create("unsealed")),
    ):
        with pytest.raises(ProtocolError):
            Lane(ends, SHALLOW, first=False)
        for fd in ends:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_a_closed_lane_leaves_no_map_and_no_descriptor() -> None:
    for _ in range(3):
        first, theirs = Lane.create(CAPACITY, SHALLOW)
        Lane(theirs, SHALLOW, first=False).close()
        first.close()
        first.close()
    maps = Path("/proc/self/maps").read_text()
    assert "djinn-lane" not in maps
    create(CAPACITY).close()


@pytest.mark.parametrize("at_once", [1, 64])
def test_who_stays_awake_for_a_message_gives_way_to_who_makes_it_every_so_many_looks(
    lanes, at_once, monkeypatch
) -> None:
    first, second = lanes
    counted: Counter[str] = Counter()
    unfinished = second.unfinished

    def look() -> bool:
        counted["looks"] += 1
        return unfinished()

    second.unfinished = look
    monkeypatch.setattr("djinn_zmq.bus.lane.LOOKS", at_once)
    monkeypatch.setattr("os.sched_yield", lambda: counted.update(["yields"]))
    assert not second.comes(1_000_000)
    assert counted["yields"] and counted["looks"] == at_once * counted["yields"]
    first.send(b"", b"message")
    counted.clear()
    assert second.comes(60_000_000_000)
    assert counted == {"looks": 1}  # it is there: nobody has to make it


@contextmanager
def descriptors_left(more: int) -> Iterator[None]:
    """No more than *more* can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(64)]  # takes the numbers below the limit, gaps too
    for fd in fillers[:more]:
        os.close(fd)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers[more:]:
            os.close(fd)


def descriptors() -> int:
    """How many are open."""
    gc.collect()  # a map's own goes with the frames of the exception that closed it
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("more", range(1, 7))
def test_a_lane_that_too_few_descriptors_are_left_for_leaves_none_open(more: int) -> None:
    before = descriptors()
    with descriptors_left(more), pytest.raises(OSError, match="Too many open files"):
        Lane.create(CAPACITY, Settings())
    assert descriptors() == before


@pytest.mark.parametrize("more", range(3))
def test_nor_does_its_second_end(more: int) -> None:
    before = descriptors()
    ends = create(CAPACITY)
    with descriptors_left(more), pytest.raises(OSError, match="Too many open files"):
        Lane(ends, Settings(), first=False)
    assert descriptors() == before


def test_a_message_over_the_limit_is_refused_with_its_first_record() -> None:
    settings = dataclasses.replace(Settings(), frame_limit=KIB)
    one, theirs = Lane.create(CAPACITY, settings)
    other = Lane(theirs, settings, first=False)
    limit = (2 + BUFFERS_LIMIT) * KIB
    fragment = CAPACITY // 4
    for nbytes in (limit, limit + 1):
        record = WHOLE.pack(nbytes).ljust(fragment, b"\0")
        assert one._out.put(MORE, record)
        if nbytes == limit:
            assert other.receive() is None  # the rest may follow
            other._coming.clear()
        else:
            with pytest.raises(ProtocolError, match=f"{limit + 1} bytes: at most {limit}"):
                other.receive()
    one.close()
    other.close()
