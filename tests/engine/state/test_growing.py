"""Arenas made beside the loop: when one is begun, and what becomes of those that are made."""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from djinn_zmq.engine.state import growing as module
from djinn_zmq.engine.state.growing import WAITING, Growing
from djinn_zmq.errors import ArenaFull, StartError
from djinn_zmq.memory.arena import GRANULE, OwnArena, Pool

ARENA = 4 * GRANULE


class Maker:
    """The thread that makes arenas, when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Future[OwnArena]]] = []

    def grow(self, nbytes: int) -> Future[OwnArena]:
        future: Future[OwnArena] = Future()
        self.asked.append((nbytes, future))
        return future

    def make(self, place: int = 0) -> None:
        nbytes, future = self.asked.pop(place)
        future.set_result(OwnArena.create(nbytes, "test"))


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def pool() -> Iterator[Pool]:
    numbers = itertools.count(1)
    pool = Pool(16 * ARENA, ARENA, lambda arena: next(numbers), "test")
    yield pool
    pool.close()


@pytest.fixture
def growing(pool: Pool, maker: Maker) -> Growing:
    return Growing(pool, maker.grow)


def test_so_many_are_made_at_once_and_each_is_the_pools_when_it_is_there(
    growing: Growing, pool: Pool, maker: Maker
) -> None:
    begun = [growing.begin(1, "") for _ in range(WAITING + 1)]
    assert begun == [True] * WAITING + [False] and pool.coming == WAITING * ARENA
    maker.make(2)
    growing.take()
    assert (pool.mapped, pool.coming) == (ARENA, (WAITING - 1) * ARENA)
    maker.make()
    growing.wait()
    assert (pool.mapped, pool.coming) == (2 * ARENA, (WAITING - 2) * ARENA)
    assert growing and growing.begin(1, "")
    while maker.asked:
        maker.make()
    growing.take()
    assert not growing and pool.mapped == (WAITING + 1) * ARENA


def test_the_limit_counts_those_that_are_on_their_way(
    growing: Growing, pool: Pool, maker: Maker
) -> None:
    pool.limit = ARENA + GRANULE
    assert growing.begin(1, "") and growing.begin(1, "") and not growing.begin(1, "")
    assert [nbytes for nbytes, _ in maker.asked] == [ARENA, GRANULE]


@pytest.mark.parametrize("error", [ArenaFull, StartError])
def test_where_the_system_has_no_more_it_is_not_asked_again_at_once(
    growing: Growing,
    pool: Pool,
    maker: Maker,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    now_s = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    assert growing.begin(1, "")
    maker.asked.pop()[1].set_exception(error("no more"))
    growing.wait()
    assert not growing and pool.coming == 0
    assert not growing.begin(1, "")
    now_s += module.AGAIN_S
    assert growing.begin(1, "")


def test_the_next_is_made_when_less_than_half_of_one_is_free(
    growing: Growing, pool: Pool, maker: Maker
) -> None:
    pool.lease(ARENA // 2, 1)
    growing.tend("")
    assert not growing
    pool.lease(1, 1)
    growing.tend("")
    growing.tend("")  # it is on its way
    assert len(maker.asked) == 1


def test_for_what_is_expected_as_many_are_made_as_it_lacks(
    growing: Growing, pool: Pool, maker: Maker
) -> None:
    pool.lease(GRANULE, 1)
    growing.expect(3 * GRANULE)
    assert not growing
    growing.expect(3 * GRANULE + 1)
    growing.expect(3 * GRANULE + 1 + ARENA)
    assert len(maker.asked) == 2
    growing.expect(100 * ARENA)
    assert len(maker.asked) == WAITING


def test_at_the_end_those_that_came_are_closed_and_those_that_failed_are_nothing(
    growing: Growing, pool: Pool, maker: Maker
) -> None:
    arenas = [OwnArena.create(ARENA, "test") for _ in range(2)]
    for arena in arenas:
        growing.begin(1, "")
        maker.asked.pop()[1].set_result(arena)
    growing.begin(1, "")
    maker.asked.pop()[1].set_exception(ArenaFull("no more"))
    growing.close()
    assert all(arena._map is None for arena in arenas) and not growing and not pool.mapped
