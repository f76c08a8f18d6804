import itertools
import os
from collections.abc import Iterator

import pytest

from djinn_zmq.errors import ArenaFull, Lost, StaleSlot
from djinn_zmq.memory.arena import GRANULE, OwnArena, Pool
from djinn_zmq.wire.tensors import Slot

LIMIT = 16 * GRANULE


@pytest.fixture
def pool() -> Iterator[Pool]:
    numbers = itertools.count(1)
    pool = Pool(LIMIT, 4 * GRANULE, lambda arena: next(numbers), "test")
    yield pool
    pool.close()


@pytest.fixture
def retired() -> list[int]:
    """The arenas that `giving` has given up."""
    return []


@pytest.fixture
def giving(retired: list[int]) -> Iterator[Pool]:
    """A pool as `pool`, whose owner can give up arenas."""
    numbers = itertools.count(1)
    pool = Pool(
        LIMIT,
        4 * GRANULE,
        lambda arena: next(numbers),
        "test",
        lambda arena: retired.append(arena.number),
    )
    yield pool
    pool.close()


def test_arenas_are_made_when_they_are_needed(pool: Pool) -> None:
    assert pool.mapped == 0
    first = pool.lease(3 * GRANULE, holder=1)
    second = pool.lease(GRANULE, holder=1)
    assert (first.slot.arena, second.slot.arena) == (1, 1)
    assert pool.mapped == 4 * GRANULE
    assert pool.lease(1, holder=1).slot.arena == 2
    assert pool.mapped == 8 * GRANULE
    assert pool.used == 5 * GRANULE


def test_a_slot_larger_than_an_arena_gets_one_of_its_own(pool: Pool) -> None:
    lease = pool.lease(10 * GRANULE, holder=1)
    assert len(lease.view) == 10 * GRANULE
    assert pool.mapped == 10 * GRANULE


def test_beyond_the_limit_it_refuses_with_sizes(pool: Pool) -> None:
    pool.lease(11 * GRANULE, holder=1)
    with pytest.raises(ArenaFull) as refusal:
        pool.lease(6 * GRANULE, holder=1)
    text = str(refusal.value)
    assert "24.0 KiB of host memory asked" in text
    assert "20.0 KiB free in one piece" in text
    assert "20.0 KiB free in all" in text
    assert "limit 64.0 KiB" in text
    pool.lease(5 * GRANULE, holder=1)
    assert pool.mapped == pool.used == LIMIT
    with pytest.raises(
        ArenaFull, match="1 B of host memory asked, 0 B free in one piece, 0 B free in all"
    ):
        pool.lease(1, holder=1)


def test_a_refusal_changes_nothing(pool: Pool) -> None:
    pool.lease(GRANULE, holder=1)
    before = (pool.mapped, pool.used, len(pool.arenas))
    with pytest.raises(ArenaFull):
        pool.lease(LIMIT, holder=1)
    assert (pool.mapped, pool.used, len(pool.arenas)) == before


def test_an_arena_that_nobody_registers_is_closed_again() -> None:
    def refuse(arena: OwnArena) -> int:
        raise Lost("the server is gone")

    pool = Pool(LIMIT, GRANULE, refuse, "test")
    with pytest.raises(Lost):
        pool.lease(1, holder=1)
    assert pool.mapped == 0


def test_what_a_holder_has_comes_back_all_at_once(pool: Pool) -> None:
    mine = [pool.lease(GRANULE, holder=1) for _ in range(5)]
    others = pool.lease(GRANULE, holder=2)
    assert pool.reclaim(1) == 5
    assert pool.reclaim(1) == 0
    assert pool.used == GRANULE
    pool.arenas[others.slot.arena].check(others.slot)
    for lease in mine:
        with pytest.raises(StaleSlot):
            pool.give_back(lease.slot)


def test_a_slot_of_an_arena_it_does_not_have_is_stale(pool: Pool) -> None:
    with pytest.raises(StaleSlot, match="arena 77 is not one of this pool"):
        pool.give_back(Slot(77, 0, 1))


def test_closing_gives_all_memory_back_though_leases_were_out() -> None:
    pool = Pool(LIMIT, GRANULE, lambda arena: arena.fd, "test")
    for _ in range(3):
        pool.lease(GRANULE, holder=1)
    before = len(os.listdir("/proc/self/fd"))
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before - 6  # a descriptor and a map's own each
    pool.close()


def test_arenas_that_are_being_made_count_against_the_limit(
    giving: Pool, retired: list[int]
) -> None:
    giving.give_back(giving.lease(GRANULE, holder=1, zone="a").slot)
    giving.coming = LIMIT - 6 * GRANULE
    assert giving.may_grow(GRANULE, "a") == 2 * GRANULE
    assert giving.may_grow(3 * GRANULE, "a") == 0
    assert giving.may_grow(3 * GRANULE, "b") == 4 * GRANULE and retired == [1]


def test_who_cannot_give_up_arenas_keeps_those_of_other_zones(pool: Pool) -> None:
    for _ in range(4):
        pool.lease(4 * GRANULE, holder=1, zone="a")
    pool.reclaim(1)
    with pytest.raises(ArenaFull, match="0 B free in one piece, 64.0 KiB free in all"):
        pool.lease(1, holder=1, zone="b")
    assert pool.mapped == LIMIT


def test_empty_arenas_that_are_too_small_give_way_where_that_is_enough(
    giving: Pool, retired: list[int]
) -> None:
    leases = [giving.lease(4 * GRANULE, holder=1, zone="a") for _ in range(4)]
    for lease in leases[:2]:
        giving.give_back(lease.slot)
    with pytest.raises(ArenaFull, match="16.0 KiB free in one piece, 32.0 KiB free in all"):
        giving.lease(9 * GRANULE, holder=1, zone="a")
    assert retired == [] and giving.ready(4 * GRANULE, "a")
    assert len(giving.lease(8 * GRANULE, holder=1, zone="a").view) == 8 * GRANULE
    assert retired == [1, 2] and giving.mapped == giving.used == LIMIT
    giving.reclaim(1)
    giving.lease(1, holder=1, zone="b")
    assert retired == [1, 2, 3]  # one was enough


def test_a_limit_that_ends_within_a_granule_leaves_nothing_free_not_less() -> None:
    pool = Pool(GRANULE + 1, GRANULE + 1, lambda arena: 1, "test")
    pool.lease(GRANULE + 1, holder=1)
    with pytest.raises(ArenaFull, match="0 B free in one piece, 0 B free in all"):
        pool.lease(1, holder=1)
    pool.close()
