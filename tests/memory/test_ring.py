"""A ring of records: what goes in comes out, whatever its length, and no lie does harm."""

import mmap
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn_zmq.errors import ProtocolError
from djinn_zmq.memory import ring
from djinn_zmq.memory.ring import HEAD, HEAD_SIZE, RECORDS, TAIL, Reader, Writer

CAPACITY = 64


def ends(capacity: int = CAPACITY) -> tuple[Writer, Reader]:
    memory = mmap.mmap(-1, 64 + ring.size_of(capacity))
    return Writer(memory, 64, capacity), Reader(memory, 64, capacity)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.none(), st.binary(max_size=CAPACITY)), max_size=60))
def test_what_is_put_is_taken_once_and_in_order(steps: list[bytes | None]) -> None:
    """A step is a record to put, or None: take one."""
    writer, reader = ends()
    there: deque[bytes] = deque()
    for step in steps:
        if step is None:
            taken = reader.take()
            assert taken == ((1, there.popleft()) if there else None)
        elif writer.put(1, step):
            there.append(step)
        else:
            used = sum(HEAD_SIZE + (len(data) + 7 & ~7) for data in there)
            assert used + HEAD_SIZE + len(step) > CAPACITY
    while there:
        assert reader.take() == (1, there.popleft())
    assert reader.take() is None


def test_a_record_larger_than_the_ring_never_has_room() -> None:
    writer, reader = ends()
    assert not writer.put(1, bytes(CAPACITY))
    assert reader.take() is None


@pytest.mark.parametrize("head", [1, 8, CAPACITY + 24, 2**63, 2**64 - 8])
def test_a_writer_that_lies_about_what_is_there_is_refused(head: int) -> None:
    writer, reader = ends()
    writer.put(1, b"honest")
    reader.take()
    writer._words[HEAD] = head
    with pytest.raises(ProtocolError, match="a record of"):
        reader.take()


@pytest.mark.parametrize("nbytes", [9, CAPACITY, 2**31, 2**32 - 1])
def test_a_length_beyond_what_is_there_is_refused(nbytes: int) -> None:
    writer, reader = ends()
    writer.put(1, b"8 bytes!")
    writer._words[RECORDS] = 1 << 32 | nbytes
    with pytest.raises(ProtocolError, match=f"a record of {nbytes} bytes where 16 are said"):
        reader.take()


@pytest.mark.parametrize("tail", [8, 2**64 - 1])
def test_a_reader_that_lies_about_what_it_took_is_refused(tail: int) -> None:
    writer, _ = ends()
    writer._words[TAIL] = tail
    with pytest.raises(ProtocolError, match="the ring's reader claims"):
        writer.put(1, b"")


@pytest.mark.parametrize("preset", [3, CAPACITY + 8, 2**63, 2**64 - 1])
def test_an_end_does_not_begin_where_the_other_side_has_preset_it(preset: int) -> None:
    memory = mmap.mmap(-1, ring.size_of(CAPACITY))
    words = memoryview(memory).cast("Q")
    words[HEAD] = words[TAIL] = preset
    reader, writer = Reader(memory, 0, CAPACITY), Writer(memory, 0, CAPACITY)
    with pytest.raises(ProtocolError, match="a record of 0 bytes where"):
        reader.take()
    with pytest.raises(ProtocolError, match="the ring's reader claims"):
        writer.put(1, b"")
    words[HEAD] = words[TAIL] = 0
    assert writer.put(1, b"the first")
    assert reader.take() == (1, b"the first")


def test_rings_of_several_threads_do_not_disturb_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the processor does not keep the order of stores, and a lock does instead."""
    monkeypatch.setattr(ring, "_ORDERED", False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            taken = [threads.submit(_pass_on, 3000) for _ in range(4)]
            assert [future.result() for future in taken] == [3000] * 4
    finally:
        sys.setswitchinterval(interval)


def _pass_on(count: int) -> int:
    """How many of *count* records, each put and taken by itself, came as they were."""
    writer, reader = ends()
    return sum(
        writer.put(1, b"%d" % number) and reader.take() == (1, b"%d" % number)
        for number in range(count)
    )


def test_a_writer_that_wants_room_is_told_of_it_once() -> None:
    writer, reader = ends()
    assert not reader.unfinished()
    writer.ask_for_room()
    assert reader.unfinished()
    assert reader.room_wanted()
    assert not reader.room_wanted()
    assert not reader.unfinished()
