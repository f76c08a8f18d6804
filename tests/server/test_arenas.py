"""What processes share, and who may map it."""

import fcntl
import os
import socket
from dataclasses import replace
from typing import Any

import pytest

from djinn_zmq.bus.lease import LeaseSocket, close_all
from djinn_zmq.errors import Lost
from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import GRANULE, OwnArena, Pool, total_size
from djinn_zmq.settings import KIB
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from tests.server.serving import Served, heard, joined, keep, told


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


def asked(served: Served, lease: Any, number: int) -> tuple[Any, int | None]:
    """What is granted of arena *number*, and how its descriptor is open."""
    lease.send(messages.Want(number))
    packet, fds = heard(served, lease)
    how = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in fds]
    close_all(fds)
    return packet, how[0] if how else None


def test_an_arena_is_written_by_who_leases_it_and_read_by_whom_it_concerns(served: Served) -> None:
    client = served.connect(served.ipc)
    lease, other = joined(served, client), joined(served, served.connect(served.ipc))
    arena = OwnArena.create(4 * KIB, "test")
    theirs = share(served, lease, arena.fd).arena
    engines = share(served, served.lease, arena.fd).arena
    owner = f"uid:{os.getuid()}"
    assert asked(served, served.lease, engines) == (messages.Granted(engines, ""), os.O_RDWR)
    assert asked(served, served.lease, theirs) == (messages.Granted(theirs, owner), os.O_RDONLY)
    for by, number, why in (
        (other, theirs, f"arena {theirs} is not an engine's"),
        (lease, theirs, f"arena {theirs} is not an engine's"),
        (lease, engines, f"nothing of yours is in arena {engines}"),
    ):
        assert asked(served, by, number) == (messages.Refused("access", why), None)
    assert asked(served, lease, 99) == (messages.Refused("lost", "arena 99 is gone"), None)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 2), arena=engines)
    assert asked(served, lease, engines) == (messages.Granted(engines, ""), os.O_RDONLY)
    for one in (lease, other):
        one.close()
    arena.close()


def test_packets_that_bring_what_they_should_not_are_refused_and_leave_no_descriptor(
    served: Served,
) -> None:
    lease = joined(served, served.connect(served.ipc))
    arena = OwnArena.create(4 * KIB, "test")
    number = share(served, lease, arena.fd).arena
    for by, packet, fds in (
        (lease, messages.Share(), ()),
        (lease, messages.Share(), (arena.fd, arena.fd)),
        (lease, messages.Want(number), (arena.fd,)),
        (served.lease, messages.Offer(1), (arena.fd,) * 3),
    ):
        before = len(os.listdir("/proc/self/fd"))
        by.send(packet, *fds)
        assert told(served, by).code == "protocol"
        assert len(os.listdir("/proc/self/fd")) == before
    served.lease.send(messages.Retire(number))  # another's: nothing happens
    assert asked(served, served.lease, number)[0].arena == number and not arena.retired
    arena.close()
    lease.close()


def test_an_arena_that_a_client_gives_up_makes_room_for_another_and_engines_let_go_of_it(
    served: Served,
) -> None:
    lease, other = (joined(served, served.connect(served.ipc)) for _ in range(2))
    arena = OwnArena.create(4 * KIB, "test")
    number = share(served, lease, arena.fd).arena
    before = served.server.arenas.nbytes()
    other.send(messages.Retire(number))  # another's: nothing happens
    assert asked(served, served.lease, number)[0].arena == number
    lease.send(messages.Retire(number))
    assert told(served, served.lease) == messages.Retire(number)
    assert served.server.arenas.nbytes() == before - arena.nbytes
    assert asked(served, lease, number)[0].text == f"arena {number} is gone"
    for one in (lease, other, arena):
        one.close()


def test_uploads_that_were_small_leave_room_for_a_large_one(served: Served) -> None:
    limit = 8 * GRANULE
    arenas = served.server.arenas
    arenas._settings = replace(arenas._settings, client_arenas=limit, arena=16 * GRANULE)
    pool = arenas.staging("me")
    small = [pool.lease(4 * GRANULE, 1) for _ in range(2)]
    numbers = list(pool.arenas)
    pool.reclaim(1)
    assert len(pool.lease(limit, 1).view) == limit
    assert [told(served, served.lease).arena for _ in small] == numbers
    arenas.end_staging("me")
    assert not arenas.nbytes()


def test_who_has_not_joined_is_hung_up_on_whatever_he_brings(served: Served) -> None:
    client = served.connect(served.ipc)
    path = served.ask(client, Op.HELLO, messages.Hello("", 0)).lease_path
    for packet, fds in (
        (messages.Want(1), ()),
        (messages.Share(), (0,)),
        (messages.Join(bytes(16)), ()),
        (messages.Join(bytes(16)), (0,)),
    ):
        before = len(os.listdir("/proc/self/fd"))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        stranger = LeaseSocket(sock)
        stranger.send(packet, *fds)
        sock.setblocking(False)
        with pytest.raises(Lost):
            told(served, stranger)
        stranger.close()
        assert len(os.listdir("/proc/self/fd")) == before
    assert not served.server.arenas.nbytes()
