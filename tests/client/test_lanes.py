"""A client's lanes: waiting for an engine that rings ahead of what it says."""

import asyncio
import errno
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from djinn_zmq.aio import AsyncConnection
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.lane import Ends, Lane
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.client import connection as connection_room
from djinn_zmq.client import lanes as lanes_room
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.lanes import CAPACITY, Lanes
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.client.waiting import WaitingConnection
from djinn_zmq.errors import Lost, ProtocolError
from djinn_zmq.memory import ring
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.codec import HEADER_SIZE
from djinn_zmq.wire.messages import Broken, Granted, Offer, Ping
from djinn_zmq.wire.ops import Op

SESSION, ENGINE = 7, 0


@pytest.fixture
def ends() -> Iterator[tuple[Lanes, Lane]]:
    """A client's lanes with one to an engine, and the engine's end of that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sharing, server = Sharing(Settings()), LeaseSocket(theirs)
    sharing.lease = LeaseSocket(ours)
    lanes = Lanes(sharing, Settings(), wanted=True)
    lanes.know(SESSION, ENGINE)
    taken: list[Lane] = []

    def grant() -> None:
        offer, fds = server.receive()
        assert offer == Offer(SESSION)
        taken.append(Lane(Ends(*fds), Settings(), first=False))
        server.send(Granted(1))

    thread = threading.Thread(target=grant)
    thread.start()
    assert lanes.of(SESSION) is not None
    thread.join()
    yield lanes, taken[0]
    lanes.close()
    taken[0].close()
    sharing.close()
    server.close()


def test_where_there_are_no_descriptors_for_a_lane_the_bus_is_taken() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sharing = Sharing(Settings())
    sharing.lease = LeaseSocket(ours)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    for left in range(6):  # of the eight that a first lane takes
        lanes = Lanes(sharing, Settings(), wanted=True)
        lanes.know(SESSION, ENGINE)
        free = os.open("/dev/null", os.O_RDONLY)  # the lowest that is not in use
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, limits[1]))
        try:
            assert lanes.of(SESSION) is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert lanes.wanted  # there may be some later
        assert not lanes.disturbed()
        lanes.close()
        assert len(os.listdir("/proc/self/fd")) == before
    sharing.close()
    theirs.close()


@pytest.mark.parametrize("refused", [1, 2])
def test_where_nothing_more_can_be_waited_for_the_bus_is_taken_and_a_lane_later(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """refused: the socket that tells of the engine's end is, or the lane."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sharing, server = Sharing(Settings()), LeaseSocket(theirs)
    sharing.lease = LeaseSocket(ours)
    monkeypatch.setattr(sharing.lease, "ask", lambda *_: (Granted(1), None))
    monkeypatch.setattr(lanes_room, "RETRY_S", 0.0)
    lanes, asked = Lanes(sharing, Settings(), wanted=True), []
    lanes.know(SESSION, ENGINE)
    before = len(os.listdir("/proc/self/fd"))

    class Full:
        """An epoll that has no room for one of what it is to wait for."""

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self.poll, self.close = self._epoll.poll, self._epoll.close
            self.unregister = self._epoll.unregister

        def register(self, *wanted: Any) -> None:
            asked.append(wanted)
            if len(asked) == refused:
                raise OSError(errno.ENOSPC, "no room for it")
            self._epoll.register(*wanted)

    names = {"EPOLLIN": select.EPOLLIN, "EPOLLET": select.EPOLLET, "epoll": Full}
    monkeypatch.setattr(lanes_room, "select", SimpleNamespace(**names))
    assert lanes.of(SESSION) is None and not list(lanes)
    assert lanes.of(SESSION) is not None
    assert not lanes.disturbed()
    server.send(Broken(1, "gone"))
    assert lanes.disturbed()
    lanes.close()
    assert len(os.listdir("/proc/self/fd")) == before
    sharing.close()
    server.close()


def test_an_engine_that_rings_ahead_is_waited_for_whenever_its_answer_comes(ends):
    lanes, engine = ends
    lane = lanes.of(SESSION)
    for wait_s in (0.0, 0.002, 0.0):  # within the time a client stays awake, and after it
        engine.ring()
        later = threading.Timer(wait_s, engine.send, (b"", b"answer"))
        later.start()
        assert lanes.hear(lane, 10.0)[1] == b"answer"
        later.join()


def test_a_bell_with_nothing_behind_it_ends_no_wait(ends):
    lanes, engine = ends
    lane = lanes.of(SESSION)
    engine.ring()
    begin_s = time.monotonic()
    assert lanes.hear(lane, 0.05) is None
    assert time.monotonic() - begin_s > 0.04
    engine.send(b"", b"later")
    assert lanes.hear(lane, 10.0)[1] == b"later"


def test_the_engine_that_was_asked_last_is_woken_while_a_request_is_made(ends):
    lanes, engine = ends
    engine.hush()
    lanes.wake()
    assert select.select([engine], [], [], 0)[0]
    lost, _ = lanes.on_broken(Broken(1, "gone"))
    lanes.drop(lost)
    engine.hush()
    lanes.wake()
    assert not select.select([engine], [], [], 0)[0]


def test_a_bell_that_tells_of_room_is_not_taken_for_one_that_rings_ahead(ends):
    lanes, engine = ends
    lane = lanes.of(SESSION)
    lane.send(b"", bytes(4 * CAPACITY))
    assert engine.receive() is None  # takes what is there, and rings: there is room for more
    begin_s = time.monotonic()
    assert lanes.hear(lane, 10.0) is None
    assert time.monotonic() - begin_s < 10.0  # there is more to be sent: time was not up


def test_a_forked_child_that_left_the_lanes_wakes_no_engine_of_its_parents(ends):
    lanes, engine = ends
    lane = lanes.of(SESSION)
    engine.hush()
    lanes.leave()
    lanes.wake()
    assert not select.select([engine], [], [], 0)[0]
    lane.close()


def test_all_that_was_asked_over_a_broken_lane_fails_whatever_its_last_message_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller's own progress function, or nonsense in the ring."""

    class Last:
        closed = False

        def receive(self) -> None:
            raise ProtocolError("nonsense")

    lane, dropped = cast(Lane, Last()), []
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    lost = Lost("gone")
    monkeypatch.setattr(connection.lanes, "on_broken", lambda _: (lane, lost))
    monkeypatch.setattr(connection.lanes, "drop", dropped.append)
    call, other = Call(Op.PING, Ping(), lane=lane), Call(Op.PING, Ping())
    connection._calls = {1: call, 2: other}
    with pytest.raises(ProtocolError):
        connection._on_broken_lane(Broken(1, "gone"))
    assert (call.reply, other.reply, dropped) == (lost, None, [lane])
    connection.close()


@pytest.fixture
def bus(ends, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What connections send over it; their lanes are those of `ends`."""
    sent: list[bytes] = []

    def made(*_: object, on_change: Callable[[], None], **__: object) -> Lanes:
        ends[0]._on_change = on_change
        return ends[0]

    monkeypatch.setattr(lanes_room, "RETRY_S", 1e6)
    monkeypatch.setattr(connection_room, "Lanes", made)
    monkeypatch.setattr(Dealer, "send", lambda _, frame, buffers: sent.append(frame))
    return sent


def lie(engine: Lane) -> None:
    """As an engine that has written, and taken, what cannot be."""
    engine._out._words[ring.HEAD] = engine._in._words[ring.TAIL] = 2**40


def ping() -> Call:
    return Call(Op.PING, Ping(), session=SESSION)


def test_a_lane_whose_ring_is_nonsense_is_dropped_and_the_bus_taken(ends, bus) -> None:
    lanes, engine = ends
    lane, calls = lanes.of(SESSION), (ping(), ping(), ping())
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    asked = [(connection.send(call), call) for call in calls[:2]]
    lie(engine)
    for request, call in asked:
        with pytest.raises(ProtocolError, match="ring"):
            connection._wait(request, call)
    assert lane.closed and not list(lanes) and not connection._calls and not bus
    connection.send(calls[2])
    assert calls[2].lane is None and len(bus) == 1
    assert lanes.on_broken(Broken(1, "gone")) is None  # of that lane: not of one that follows
    connection.close()


def test_a_lane_that_lies_about_room_fails_what_is_asked_there_and_what_it_was_asked(
    ends, bus
) -> None:
    lanes, engine = ends
    lane, calls = lanes.of(SESSION), [ping() for _ in range(CAPACITY // HEADER_SIZE)]
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    connection.send(calls[0])
    lie(engine)
    with pytest.raises(ProtocolError, match="ring"):
        for call in calls[1:]:  # what is said to be taken is looked at once a ringful
            connection.send(call)
    asked = calls[: calls.index(call)]
    assert len(connection._calls) == len(asked) > 1
    assert all(isinstance(one.reply, ProtocolError) for one in asked)
    assert lane.closed and not bus
    connection.close()


def test_what_nobody_refers_to_is_said_on_the_bus_where_the_lane_lies(ends, bus) -> None:
    lanes, engine = ends
    lane, call = lanes.of(SESSION), ping()
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    connection.leftovers.add(SESSION, 5)
    lie(engine)
    connection.send(call)
    assert lane.closed and call.lane is None
    assert [codec.peek(frame).op for frame in bus] == [Op.RELEASE, Op.PING]
    connection.close()


def test_in_asyncio_code_a_lane_whose_ring_is_nonsense_is_looked_at_once(ends, bus) -> None:
    lanes, engine = ends
    lane = lanes.of(SESSION)

    def operation() -> Operation[None]:
        yield ping()

    async def main() -> None:
        connection = AsyncConnection("tcp://127.0.0.1:1", None, Settings())
        connection._on_lanes_change()
        assert connection._bells == {lane.fileno()}
        asking = [asyncio.create_task(connection.run(operation())) for _ in range(2)]
        await asyncio.sleep(0)
        lie(engine)
        with closing(connection):
            assert not connection._take_one()
            for one in asking:
                with pytest.raises(ProtocolError, match="ring"):
                    await one
            assert lane.closed and not connection._calls and not connection._bells

    asyncio.run(main())


def test_a_server_that_went_and_came_back_owes_nothing_to_who_was_not_looking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is seen once that it went: by whoever looks first."""
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    call = Call(Op.PING, Ping())
    connection._calls = {1: call}
    monkeypatch.setattr(connection, "alive", lambda: False)
    with pytest.raises(Lost, match="is gone"):
        connection.look()
    assert isinstance(call.reply, Lost)
    connection.close()


def test_an_offer_that_is_interrupted_leaves_no_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sharing = Sharing(Settings())
    sharing.lease = LeaseSocket(ours)
    lanes = Lanes(sharing, Settings(), wanted=True)
    lanes.know(SESSION, ENGINE)
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sharing.lease.ask = interrupt  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        lanes.of(SESSION)
    assert not list(lanes)
    lanes.close()
    assert len(os.listdir("/proc/self/fd")) == before
    sharing.close()
    theirs.close()
