"""The memory that a client maps of others'."""

import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from djinn_zmq.client.sharing import Sharing
from djinn_zmq.errors import ArenaFull, Lost, RequestError
from djinn_zmq.memory.arena import GRANULE, OwnArena, mark_retired
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire.messages import Broken, Granted, Retire
from djinn_zmq.wire.tensors import File, Slot, Tensor


@pytest.fixture
def engines() -> Iterator[dict[int, OwnArena]]:
    made = {number: OwnArena.create(4 * GRANULE, "test") for number in (1, 2, 3)}
    yield made
    for arena in made.values():
        arena.close()


def test_an_arena_that_its_server_let_go_of_is_unmapped_when_another_is_mapped(
    engines: dict[int, OwnArena],
) -> None:
    """Its pages are not free as long as anybody maps them."""
    before = len(os.listdir("/proc/self/fd"))
    sharing: Any = Sharing(Settings())
    sharing.lease = SimpleNamespace(
        ask=lambda want: (None, os.dup(engines[want.arena].fd)), close=lambda: None
    )
    sharing.arena(1)
    sharing.arena(2)
    assert list(sharing._arenas) == [1, 2]  # they hold nothing, but are about to
    mark_retired(engines[1].fd)
    assert sharing.arena(2).retired is False
    sharing.arena(3)
    assert list(sharing._arenas) == [2, 3]
    sharing.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def sharing() -> Iterator[Any]:
    """Of a client whose server numbers its arenas."""
    sharing: Any = Sharing(replace(Settings(), client_arenas=MIB, arena=MIB))
    sharing.lease = SimpleNamespace(
        ask=lambda *_: (Granted(1), None), close=lambda: None, news=list
    )
    yield sharing
    sharing.close()


def test_an_array_of_a_clients_own_is_known_by_what_fills_its_slot(sharing: Any) -> None:
    assert sharing.slot_of(np.zeros(4)) is None
    array, other = (sharing.array(np.dtype(np.float32), (4, 1024)) for _ in range(2))
    slot = sharing.slot_of(array)
    assert isinstance(slot, Slot) and slot != sharing.slot_of(other)
    assert sharing.slot_of(array.view(np.int32)) == sharing.slot_of(array.reshape(-1)) == slot
    assert sharing.slot_of(array[:2]) is None and sharing.slot_of(array[2:]) is None
    assert sharing.slot_of(np.zeros_like(array)) is None
    array[:], other[:] = 1, 2
    assert (array == 1).all()


def test_an_array_of_a_clients_own_is_known_by_itself_as_long_as_it_is_what_it_was(
    sharing: Any,
) -> None:
    def made() -> np.ndarray:
        return sharing.array(np.dtype(np.float32), (4, 1024))

    array = made()
    tensor = sharing.given(array)
    assert tensor == Tensor("float32", (4, 1024), sharing.slot_of(array))
    assert sharing.given(array[:]) is sharing.given(np.zeros(4)) is sharing.given([1.0]) is None
    array.shape = (1024, 4)
    assert sharing.given(array) is None
    array.shape = (4, 1024)
    assert sharing.given(array) is tensor
    with warnings.catch_warnings(action="ignore"):  # numpy means to end both
        array.strides = (4, 4)
        assert sharing.given(array) is None
        array.strides = (4096, 4)
        assert sharing.given(array) is tensor
        array.dtype = np.dtype(np.int32)
    assert sharing.given(array) is None
    root = array.reshape(-1)  # keeps the slot, not the array
    del array
    assert not sharing._given and sharing._lent
    del root


def test_a_slot_comes_back_when_nothing_refers_to_its_array_any_more(sharing: Any) -> None:
    array = sharing.array(np.dtype(np.uint8), (MIB // 2,))
    view = array[1:]
    del array
    with pytest.raises(ArenaFull):
        sharing.stage(3 * MIB // 4)
    view[:] = 7  # it is still its own
    del view
    lease = sharing.stage(3 * MIB // 4)
    assert sharing._pool.used == 3 * MIB // 4 and not sharing._lent
    sharing.give_back(lease)
    assert sharing._pool.used == 0


def test_what_was_staged_in_small_arenas_leaves_room_for_what_is_larger(sharing: Any) -> None:
    numbers, given_up = itertools.count(1), []
    sharing._settings = replace(Settings(), client_arenas=MIB, arena=MIB // 4)
    sharing.lease.ask = lambda *_: (Granted(next(numbers)), None)
    sharing.lease.send = given_up.append
    staged = [sharing.stage(MIB // 4) for _ in range(4)]
    for lease in staged[1:]:
        sharing.give_back(lease)
    with pytest.raises(ArenaFull):
        sharing.stage(MIB)
    assert not given_up  # it would not be enough
    sharing.give_back(staged[0])
    assert len(sharing.stage(MIB).view) == MIB
    assert given_up == [Retire(number) for number in (1, 2, 3, 4)]


def test_what_came_beside_news_is_closed_and_who_shares_nothing_hears_none(sharing: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    news = Broken(1, "gone")
    sharing.lease.news = lambda: [(news, [os.dup(0)])]
    assert sharing.news() == [news] and len(os.listdir("/proc/self/fd")) == before
    alone = Sharing(Settings())
    assert alone.news() == []
    tensor = Tensor("uint8", (1,), Slot(1, 0, 1))
    assert sharing.can_map(tensor) and not alone.can_map(tensor)
    assert not sharing.can_map(Tensor("uint8", (1,), File(1)))
    with pytest.raises(ArenaFull, match="shares no memory"):
        alone.arena(1)
    with pytest.raises(
        RequestError, match="CUDA memory is shared only on the server's own machine"
    ):
        alone.cuda()
    with pytest.raises(Lost, match="without a descriptor"):
        sharing.arena(1)
    alone.close()


def test_a_forked_child_hangs_up_alone(sharing: Any) -> None:
    hung_up: list[bool] = []
    sharing.lease.close = lambda: hung_up.append(True)
    sharing.leave()
    assert hung_up == [True] and sharing.lease is None
    sharing.leave()
    assert hung_up == [True]
