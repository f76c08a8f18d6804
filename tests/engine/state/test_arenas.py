"""The arenas an engine works in: whose they are, and that a device knows of each as long as it is mapped."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from djinn_zmq.engine.state.arenas import Arenas
from djinn_zmq.errors import AccessDenied, Lost, ProtocolError, StartError
from djinn_zmq.memory.arena import GRANULE, OwnArena
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire.messages import Broken, Granted, Retire, Share, Want
from djinn_zmq.wire.tensors import Frame, Slot, Tensor

THEIRS = 40  # an arena of somebody else's


class Server:
    """Numbers arenas, and has one of "me"'s: what it was asked and told."""

    def __init__(self) -> None:
        self.arena = OwnArena.create(4 * GRANULE, "test")
        self.said: list[Any] = []
        self.gives = True

    def ask(self, packet: Any, *fds: int) -> tuple[Granted, int | None]:
        self.said.append(packet)
        if isinstance(packet, Share):
            return Granted(len(self.said)), None
        fd = os.dup(self.arena.fd) if self.gives else None
        return Granted(packet.arena, "me"), fd

    def send(self, packet: Any) -> None:
        self.said.append(packet)


class Registering:
    """A device, and which arenas it knows of."""

    def __init__(self) -> None:
        self.known: list[int] = []
        self.refuses = False

    def attach(self, arena: Any) -> None:
        if self.refuses:
            raise StartError("no more can be registered")
        self.known.append(arena.fd)

    def detach(self, arena: Any) -> None:
        self.known.remove(arena.fd)


@pytest.fixture
def server() -> Iterator[Server]:
    before = len(os.listdir("/proc/self/fd"))
    server = Server()
    yield server
    server.arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def device() -> Registering:
    return Registering()


@pytest.fixture
def arenas(server: Server, device: Registering) -> Iterator[Arenas]:
    settings = replace(Settings(), host_memory=8 * MIB, arena=MIB)
    stand_ins: Any = (server, 0, device)
    arenas = Arenas(settings, *stand_ins, lambda: made.set())
    made.clear()
    yield arenas
    arenas.close()


made = threading.Event()


def tensor_in(number: int) -> Tensor:
    return Tensor("uint8", (1,), Slot(number, 0, 1))


def test_a_tensor_is_taken_from_an_arena_of_its_owners_alone(
    arenas: Arenas, server: Server
) -> None:
    arenas.check_owner(Tensor("uint8", (1,), Frame(0)), "you")  # it came with the request
    arenas.check_owner(tensor_in(THEIRS), "me")
    with pytest.raises(AccessDenied, match="not yours"):
        arenas.check_owner(tensor_in(THEIRS), "you")
    arenas.prepare()
    (own,) = arenas.pool.arenas
    for owner in ("me", ""):
        with pytest.raises(AccessDenied, match="not yours"):
            arenas.check_owner(tensor_in(own), owner)
    assert [one for one in server.said if isinstance(one, Want)] == [Want(THEIRS)]


def test_a_device_knows_of_an_arena_as_long_as_it_is_mapped(
    arenas: Arenas, device: Registering
) -> None:
    foreign = arenas.find(THEIRS)
    assert arenas.find(THEIRS) is foreign and device.known == [foreign.fd]
    arenas.on_packet(Granted(1))  # an answer that came late
    arenas.on_packet(Retire(THEIRS + 1))  # one that was never mapped
    arenas.on_packet(Retire(THEIRS))
    assert not device.known and foreign._map is None
    with pytest.raises(ProtocolError, match="Broken is not for an engine"):
        arenas.on_packet(Broken(1, "a lane"))


def test_an_arena_that_comes_without_its_memory_is_lost(arenas: Arenas, server: Server) -> None:
    server.gives = False
    for mapped in (arenas.find, arenas.own):
        with pytest.raises(Lost, match="without a descriptor"):
            mapped(THEIRS)


def test_a_predecessors_arena_that_the_device_refuses_is_given_up(
    arenas: Arenas, server: Server, device: Registering
) -> None:
    device.refuses = True
    with pytest.raises(Lost, match="no more can be registered"):
        arenas.own(THEIRS)
    assert server.said == [Want(THEIRS), Retire(THEIRS)] and not arenas.pool.arenas
    device.refuses = False
    assert arenas.own(THEIRS) is arenas.own(THEIRS) is arenas.pool.arenas[THEIRS]
    assert len(device.known) == 1


def test_an_arena_of_its_own_that_is_empty_makes_room_for_anothers(
    arenas: Arenas, server: Server, device: Registering
) -> None:
    pool = arenas.pool
    lease = pool.lease(8 * MIB, 1, zone="me")
    (number,) = pool.arenas
    assert len(device.known) == 1
    pool.give_back(lease.slot)
    pool.lease(8 * MIB, 1, zone="you")
    assert Retire(number) in server.said and number not in pool.arenas and len(device.known) == 1


def test_an_arena_that_is_made_beside_it_is_told_of_and_waited_for_at_the_end(
    server: Server, device: Registering
) -> None:
    stand_ins: Any = (server, 0, device)
    arenas = Arenas(Settings(), *stand_ins, made.set)
    made.clear()
    future = arenas.grow(MIB)
    arenas.close()
    assert future.done() and made.is_set()
    future.result().close()
