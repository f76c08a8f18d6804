import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from djinn_zmq.errors import Closed, OnDevice, ProtocolError, StaleSlot
from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import (
    ENTRY_SIZE,
    FILLING,
    GRANULE,
    HEADER,
    HEADER_ROOM,
    MAGIC,
    Arena,
    OwnArena,
    data_offset,
    total_size,
)
from djinn_zmq.wire.tensors import Slot


@pytest.fixture
def arena() -> Iterator[OwnArena]:
    arena = OwnArena.create(8 * GRANULE, "test")
    yield arena
    arena.leases.clear()
    arena.close()


def reader_of(arena: OwnArena) -> Arena:
    return Arena(arena.number, shared.read_only(arena.fd))


def test_a_slot_is_as_long_as_was_asked_and_readable_by_whoever_has_the_descriptor(
    arena: OwnArena,
) -> None:
    lease = arena.lease(5000, holder=1)
    assert lease is not None and len(lease.view) == 5000
    lease.view[:] = bytes(range(250)) * 20
    reader = reader_of(arena)
    assert reader.read(lease.slot, 5000) == bytes(range(250)) * 20
    assert reader.view(lease.slot, 5000).readonly
    reader.close()


def test_what_was_given_back_is_stale_for_everybody_and_cannot_be_given_back_again(
    arena: OwnArena,
) -> None:
    lease = arena.lease(1, holder=1)
    assert lease is not None
    reader = reader_of(arena)
    reader.check(lease.slot)
    arena.give_back(lease.slot)
    for refused in (
        lambda: reader.read(lease.slot, 1),
        lambda: reader.check(lease.slot),
        lambda: arena.give_back(lease.slot),
        lambda: arena.adopt(lease.slot, 1, holder=1),
    ):
        with pytest.raises(
            StaleSlot, match="slot 0 of arena 0 is at generation 2, the reference at 1"
        ):
            refused()
    again = arena.lease(1, holder=1)
    assert again is not None and again.slot.index == lease.slot.index
    assert again.slot.generation > lease.slot.generation
    with pytest.raises(StaleSlot):
        reader.check(lease.slot)
    reader.check(again.slot)
    reader.close()


def test_a_slot_that_was_merged_into_a_larger_one_stays_stale(arena: OwnArena) -> None:
    first, second = arena.lease(GRANULE, 1), arena.lease(GRANULE, 1)
    assert first is not None and second is not None
    arena.give_back(second.slot)
    arena.give_back(first.slot)
    whole = arena.lease(8 * GRANULE, 1)
    assert whole is not None and whole.slot.index == 0
    for generation in range(4):
        with pytest.raises(StaleSlot):
            arena.view(Slot(0, second.slot.index, generation), 1)


def test_a_generation_wraps_round(arena: OwnArena) -> None:
    os.pwrite(arena.fd, struct.pack("<I", 2**32 - 1), HEADER_ROOM)
    lease = arena.lease(1, 1)
    assert lease is not None and lease.slot.generation == 0
    arena.give_back(lease.slot)
    with pytest.raises(StaleSlot):
        arena.check(lease.slot)


def test_free_pieces_grow_together_again(arena: OwnArena) -> None:
    leases = [arena.lease(GRANULE, 1) for _ in range(8)]
    assert arena.lease(1, 1) is None
    for place in (1, 3, 5, 7, 0, 4, 2, 6):
        assert leases[place] is not None
        arena.give_back(leases[place].slot)
    assert arena.largest_free == arena.capacity == 8 * GRANULE
    assert arena.used == 0


def test_a_slot_that_is_too_large_is_no_slot(arena: OwnArena) -> None:
    assert arena.lease(8 * GRANULE + 1, 1) is None
    assert arena.lease(8 * GRANULE, 1) is not None


@pytest.mark.parametrize("index", [-1, -8, 8, 2**40])
def test_a_slot_the_arena_does_not_have_is_refused_by_name(arena: OwnArena, index: int) -> None:
    slot = Slot(0, index, 0)
    for refused in (
        lambda: arena.view(slot, 1),
        lambda: arena.check(slot),
        lambda: arena.give_back(slot),
    ):
        with pytest.raises(ProtocolError, match=f"slot {index} of an arena with 8"):
            refused()


@pytest.mark.parametrize("nbytes", [-1, GRANULE + 1, 2**60])
def test_bytes_a_slot_does_not_have_are_refused(arena: OwnArena, nbytes: int) -> None:
    lease = arena.lease(10, 1)
    assert lease is not None
    with pytest.raises(ProtocolError, match="which has 4096"):
        arena.view(lease.slot, nbytes)


def test_a_table_that_lies_about_a_length_is_refused(arena: OwnArena) -> None:
    lease = arena.lease(10, 1)
    assert lease is not None
    os.pwrite(arena.fd, struct.pack("<I", 2**32 - 1), HEADER_ROOM + 4)
    with pytest.raises(ProtocolError, match="bytes of slot 0"):
        arena.view(lease.slot, 9 * GRANULE)
    for length in (2**32 - 1, FILLING):  # beyond the arena; none, and still to be filled
        os.pwrite(arena.fd, struct.pack("<I", length), HEADER_ROOM + 4)
        with pytest.raises(ProtocolError, match="damaged"):
            OwnArena(1, os.dup(arena.fd))


def test_a_closed_arena_says_so(arena: OwnArena) -> None:
    lease = arena.lease(10, 1)
    assert lease is not None
    arena.close()
    arena.close()
    for refused in (
        lambda: arena.view(lease.slot, 1),
        lambda: arena.check(lease.slot),
        lambda: arena.give_back(lease.slot),
        lambda: arena.lease(1, 1),
    ):
        with pytest.raises(Closed, match="arena 0 is closed"):
            refused()


def test_a_view_outlives_its_arena(arena: OwnArena) -> None:
    lease = arena.lease(5, 1)
    assert lease is not None
    lease.view[:] = b"still"
    arena.close()
    assert bytes(lease.view) == b"still"


def sealed(content: bytes, nbytes: int) -> int:
    fd = shared.create(nbytes, "lie")
    os.pwrite(fd, content, 0)
    return fd


@pytest.mark.parametrize(
    "header, nbytes",
    [
        (b"", 1),
        (b"", HEADER_ROOM),
        (bytes(64), total_size(4)),
        (HEADER.pack(b"DJARENA0", GRANULE, 4, data_offset(4)), total_size(4)),
        (HEADER.pack(MAGIC, 1, 4, data_offset(4)), total_size(4)),
        (HEADER.pack(MAGIC, GRANULE, 2**32 - 1, data_offset(4)), total_size(4)),
        (HEADER.pack(MAGIC, GRANULE, 2**32 - 1, data_offset(2**32 - 1)), total_size(4)),
        (HEADER.pack(MAGIC, GRANULE, 4, 0), total_size(4)),
        (HEADER.pack(MAGIC, GRANULE, 4, 2**64 - 1), total_size(4)),
        (HEADER.pack(MAGIC, GRANULE, 4, data_offset(4)), total_size(4) + 1),
        (HEADER.pack(MAGIC, GRANULE, 4, data_offset(4)), total_size(3)),
    ],
)
def test_a_header_that_lies_is_refused_and_its_descriptor_closed(
    header: bytes, nbytes: int
) -> None:
    for kind in (Arena, OwnArena):
        with pytest.raises(ProtocolError, match="no arena"):
            kind(1, sealed(header, nbytes))


def test_an_arena_that_may_only_be_read_cannot_be_owned(arena: OwnArena) -> None:
    with pytest.raises(ProtocolError, match="may only be read"):
        OwnArena(1, shared.read_only(arena.fd))


def test_a_slot_that_is_being_filled_is_read_by_nobody_until_it_is_filled(arena: OwnArena) -> None:
    lease = arena.lease(2 * GRANULE, 1)
    assert lease
    arena.filling(lease.slot)
    reader = reader_of(arena)
    for one in (arena, reader):
        with pytest.raises(OnDevice, match="slot 0 of arena 0 is still being filled"):
            one.view(lease.slot, 5)
        one.check(lease.slot)  # it is still what it was
    lease.view[:5] = b"whole"
    arena.filled(lease.slot)
    assert reader.read(lease.slot, 5) == b"whole"
    reader.close()


def test_what_is_filled_too_late_says_nothing_of_the_slot_that_stands_there_now(
    arena: OwnArena,
) -> None:
    late = arena.lease(GRANULE, 1)
    assert late
    arena.filling(late.slot)
    arena.give_back(late.slot)
    now = arena.lease(GRANULE, 1)
    assert now and now.slot.index == late.slot.index
    arena.filling(now.slot)
    arena.filled(late.slot)
    with pytest.raises(OnDevice):
        arena.view(now.slot, 5)


def test_the_last_generation_is_followed_by_the_first_when_a_slot_comes_back(
    arena: OwnArena,
) -> None:
    os.pwrite(arena.fd, struct.pack("<I", 2**32 - 2), HEADER_ROOM)
    last = arena.lease(GRANULE, 1)
    assert last and last.slot.generation == 2**32 - 1
    arena.give_back(last.slot)
    assert arena.used == 0
    with pytest.raises(StaleSlot):
        arena.check(last.slot)


def test_a_slot_that_was_never_filled_is_no_successors_and_free_again(arena: OwnArena) -> None:
    one, other = arena.lease(2 * GRANULE, 1), arena.lease(GRANULE, 1)
    assert one and other
    arena.filling(one.slot)
    arena.filling(other.slot)
    arena.give_back(other.slot)  # its checkpoint was released meanwhile
    arena.filled(other.slot)
    assert arena.used == 2 * GRANULE

    successor = OwnArena(arena.number, os.dup(arena.fd))
    assert successor.used == 2 * GRANULE
    with pytest.raises(OnDevice):
        successor.adopt(one.slot, 5, holder=9)
    assert successor.sweep_unleased() == 1
    assert successor.largest_free == successor.capacity
    successor.close()


def test_a_successor_takes_over_what_it_knows_and_frees_the_rest(arena: OwnArena) -> None:
    leases = [arena.lease(GRANULE, holder) for holder in range(4)]
    kept, forgotten, returned, large = leases
    assert kept and forgotten and returned and large
    kept.view[:5] = b"still"
    arena.give_back(returned.slot)

    successor = OwnArena(arena.number, os.dup(arena.fd))
    assert successor.used == 3 * GRANULE
    adopted = successor.adopt(kept.slot, 5, holder=9)
    assert bytes(adopted.view) == b"still"
    assert adopted.holder == 9
    assert successor.sweep_unleased() == 2
    assert successor.used == GRANULE
    assert successor.largest_free == 7 * GRANULE
    assert successor.sweep_unleased() == 0
    for slot in (forgotten.slot, large.slot, returned.slot):
        with pytest.raises(StaleSlot):
            successor.adopt(slot, 1, holder=9)
    successor.give_back(kept.slot)
    assert successor.largest_free == successor.capacity
    del adopted
    successor.leases.clear()
    successor.close()


class SlotsInUse(RuleBasedStateMachine):
    """An arena of 24 granules against a dictionary."""

    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.arena = OwnArena.create(24 * GRANULE, "model")
        self.reader = reader_of(self.arena)
        self.held: dict[Slot, bytes] = {}
        self.past: set[Slot] = set()

    @rule(target=slots, nbytes=st.integers(0, 8 * GRANULE), fill=st.integers(0, 255))
    def lease(self, nbytes: int, fill: int) -> Slot | None:
        largest = self.arena.largest_free
        lease = self.arena.lease(nbytes, holder=fill)
        if lease is None:
            assert nbytes > largest or not largest
            return None
        assert lease.slot not in self.held and lease.slot not in self.past
        content = bytes([fill]) * nbytes
        lease.view[:] = content
        self.held[lease.slot] = content
        return lease.slot

    @rule(slot=consumes(slots))
    def give_back(self, slot: Slot | None) -> None:
        if slot in self.held:
            self.arena.give_back(slot)
            del self.held[slot]
            self.past.add(slot)

    @rule(kept=st.sets(st.integers(0, 23)))
    def crash_and_succeed(self, kept: set[int]) -> None:
        """The owner dies; a new one knows of some slots only."""
        successor = OwnArena(0, os.dup(self.arena.fd))
        self.arena.leases.clear()
        self.arena.close()
        self.arena = successor
        for slot in [slot for slot in self.held if slot.index not in kept]:
            self.past.add(slot)
            del self.held[slot]
        for slot, content in self.held.items():
            successor.adopt(slot, len(content), holder=1)
        successor.sweep_unleased()

    @invariant()
    def contents_are_intact(self) -> None:
        for slot, content in self.held.items():
            assert self.reader.read(slot, len(content)) == content

    @invariant()
    def what_is_past_is_stale(self) -> None:
        for slot in self.past:
            with pytest.raises(StaleSlot):
                self.reader.check(slot)

    @invariant()
    def slots_do_not_overlap_and_free_and_used_add_up(self) -> None:
        taken: list[int] = []
        for slot, content in self.held.items():
            taken += range(slot.index, slot.index + max(1, -(-len(content) // GRANULE)))
        assert len(set(taken)) == len(taken)
        assert self.arena.used == len(taken) * GRANULE
        longest = run = 0
        for granule in range(24):
            run = 0 if granule in taken else run + 1
            longest = max(longest, run)
        assert self.arena.largest_free == longest * GRANULE
        assert set(self.arena.leases) == {slot.index for slot in self.held}

    def teardown(self) -> None:
        self.reader.close()
        self.arena.leases.clear()
        self.arena.close()


SlotsInUse.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
test_slots_behave_as_their_model = SlotsInUse.TestCase


def test_a_table_entry_is_what_the_picture_says() -> None:
    assert (HEADER_ROOM, ENTRY_SIZE, HEADER.size) == (64, 8, 24)
    assert data_offset(504) == GRANULE
    assert data_offset(505) == 2 * GRANULE
