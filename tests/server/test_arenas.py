"""What processes share, and who may map it."""

import fcntl
import os
from dataclasses import replace
from typing import Any

import pytest

from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import GRANULE, OwnArena, Pool, total_size
from djinn_zmq.settings import KIB
from djinn_zmq.wire import messages
from tests.server.serving import Served, joined, told


def test_an_arena_that_an_engine_gives_up_says_so_to_all_who_map_it(served: Served) -> None:
    arena, other = (OwnArena.create(4 * KIB, "test") for _ in range(2))
    numbers = []
    for one in (arena, other):
        served.lease.send(messages.Share(), one.fd)
        numbers.append(told(served, served.lease).arena)
    assert not arena.retired
    served.lease.send(messages.Retire(numbers[0]))
    served.lease.send(messages.Want(numbers[0]))
    assert told(served, served.lease).text == f"arena {numbers[0]} is gone"
    assert arena.retired and not other.retired
    arena.close()
    other.close()


def share(served: Served, lease: Any, fd: int) -> Any:
    lease.send(messages.Share(), fd)
    return told(served, lease)


@pytest.mark.parametrize("nbytes", [0, 1, total_size(1) - 1])
def test_memory_too_small_for_an_arena_is_refused(served: Served, nbytes: int) -> None:
    lease = joined(served, served.connect(served.ipc))
    fd = os.memfd_create("small", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, shared.SEALS)
    refused = share(served, lease, fd)
    assert (refused.code, refused.text) == (
        "protocol",
        f"{nbytes} bytes of shared memory are no arena",
    )
    assert not served.server.arenas.nbytes()
    os.close(fd)
    lease.close()


@pytest.mark.parametrize("each", [1, 505 * GRANULE])
def test_a_limit_is_filled_by_arenas_of_any_size_and_not_passed_by_the_smallest(
    served: Served, each: int
) -> None:
    limit = 4 * each if each > 1 else 16 * KIB
    arenas = served.server.arenas
    arenas._settings = replace(arenas._settings, client_arenas=limit)
    lease = joined(served, served.connect(served.ipc))
    pool = Pool(limit, each, lambda arena: share(served, lease, arena.fd).arena, "test")
    while pool.may_grow(each):
        pool.grow(each)
    assert pool.mapped == limit
    small = OwnArena.create(1, "test")
    for _ in range(10):
        last = share(served, lease, small.fd)
    assert last.code == "arena-full"
    small.close()
    pool.close()
    lease.close()
