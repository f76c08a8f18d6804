"""Waiting for sockets and descriptors: nobody is missed, and nobody starves."""

import os
import time
from collections.abc import Iterator

import pytest
import zmq

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.limits import has_message
from djinn_zmq.bus.poll import MANY, Poll
from djinn_zmq.settings import KIB, Settings

Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def pair(context: zmq.Context[Socket]) -> tuple[Socket, Socket]:
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://poll")
    theirs.connect("inproc://poll")
    return ours, theirs


class Both:
    """A socket that is received from and sent on, as `bus.router` has one."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.fd, self.unheard = -1, set[int]()

    def send(self, data: bytes) -> None:
        self.unheard.add(self.fd)
        self.socket.send(data)

    def receive(self) -> bytes | None:
        return self.socket.recv() if has_message(self.socket) else None


@pytest.fixture
def poll() -> Iterator[Poll]:
    poll = Poll()
    yield poll
    poll.close()


def test_a_message_from_before_the_watch_is_not_missed(
    poll: Poll, pair: tuple[Socket, Socket]
) -> None:
    ours, theirs = pair
    theirs.send(b"early")
    taken: list[bytes] = []
    poll.watch(ours, lambda: taken.append(ours.recv()))
    poll.turn(5.0)
    assert taken == [b"early"]


def take_from(both: Both, taken: list[bytes]) -> bool:
    message = both.receive()
    taken.extend([message] if message is not None else [])
    return message is not None


def test_messages_whose_signal_a_send_swallowed_are_heard(
    poll: Poll, pair: tuple[Socket, Socket]
) -> None:
    ours, theirs = pair
    both, taken = Both(ours), list[bytes]()
    poll.watch_used(both, lambda: take_from(both, taken))
    for number in range(200):
        theirs.send(b"%d" % number)
        both.send(b"anything")  # reads the socket's commands, its signal among them
        while len(taken) <= number:
            poll.turn(5.0)
        assert theirs.recv() == b"anything"
    assert taken == [b"%d" % number for number in range(200)]


def test_a_socket_that_always_has_more_does_not_keep_a_descriptor_waiting(
    poll: Poll, pair: tuple[Socket, Socket]
) -> None:
    ours, theirs = pair
    read, write = os.pipe()
    heard: list[bytes] = []

    both = Both(ours)

    def busy() -> bool:
        both.receive()
        theirs.send(b"again")
        return True

    poll.watch_used(both, busy)
    poll.watch(read, lambda: heard.append(os.read(read, 1)))
    theirs.send(b"first")
    os.write(write, b"x")
    for _ in range(5):
        poll.turn(5.0)
    assert heard == [b"x"]
    assert has_message(ours)
    poll.unwatch(read)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("count", [3, 2 * MANY + 2])
@pytest.mark.parametrize("early", [True, False])
def test_messages_that_come_at_once_are_all_taken_though_their_signal_is_one(
    poll: Poll, pair: tuple[Socket, Socket], early: bool, count: int
) -> None:
    ours, theirs = pair
    both, taken = Both(ours), list[bytes]()
    poll.watch_used(both, lambda: take_from(both, taken))
    if not early:
        poll.turn(0)  # nothing is there yet
    for number in range(count):
        theirs.send(b"%d" % number)
    for _ in range(count):  # they may come one by one, too
        poll.turn(0 if len(taken) == count else 5.0)
    assert taken == [b"%d" % number for number in range(count)]


def test_what_is_unwatched_by_one_is_not_called_by_the_same_turn(poll: Poll) -> None:
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def ready(read: int, other: int) -> None:
        called.append(read)
        poll.unwatch(other)

    (first, _), (second, _) = pipes
    poll.watch(first, lambda: ready(first, second))
    poll.watch(second, lambda: ready(second, first))
    for _, write in pipes:
        os.write(write, b"x")
    poll.turn(5.0)
    assert len(called) == 1
    for ends in pipes:
        for end in ends:
            os.close(end)


def lanes() -> tuple[Lane, Lane]:
    first, theirs = Lane.create(64 * KIB, Settings())
    return first, Lane(theirs, Settings(), first=False)


def test_a_lane_is_heard_from_before_the_watch_and_to_its_last_message(poll: Poll) -> None:
    ours, theirs = lanes()
    taken: list[bytes] = []

    def ready() -> bool:
        message = ours.receive()
        assert message is not None
        taken.append(message[1])
        return ours.unfinished()

    for number in range(3):
        theirs.send(b"", b"%d" % number)
    poll.watch_lane(ours, ready)
    for number in range(3, 6):  # rings once for several: the bell is not read
        theirs.send(b"", b"%d" % number)
    while len(taken) < 6:
        poll.turn(5.0)
    assert taken == [b"%d" % number for number in range(6)]
    theirs.send(b"", b"later")
    poll.turn(5.0)
    assert taken[-1] == b"later"
    ours.close()
    theirs.close()


def test_a_lane_whose_other_end_waits_for_room_is_looked_at_until_it_is_told(poll: Poll) -> None:
    ours, theirs = lanes()
    taken = 0

    def ready() -> bool:
        nonlocal taken
        taken += ours.receive() is not None
        theirs.receive()  # has been rung: takes up its backlog
        return ours.unfinished()

    poll.watch_lane(ours, ready)
    for _ in range(10):
        theirs.send(b"", bytes(16 * KIB))
    while taken < 10:
        poll.turn(5.0)
    ours.close()
    theirs.close()


@pytest.fixture
def ends() -> Iterator[tuple[Lane, Lane]]:
    ours, theirs = lanes()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def awake(
    poll: Poll, ends: tuple[Lane, Lane], monkeypatch: pytest.MonkeyPatch
) -> tuple[Poll, Lane, list[str]]:
    """A poll that stays awake, on a machine of any size; a lane's other end; and what it does when."""
    ours, theirs = ends
    poll.stays_awake = True
    monkeypatch.setattr("djinn_zmq.bus.poll.COLD_NS", -1)  # always cold
    done: list[str] = []

    def ready() -> bool:
        message = ours.receive()
        done.append("nothing" if message is None else message[1].decode())
        return ours.unfinished()

    poll.meanwhile = lambda: done.append("meanwhile")
    poll.watch_lane(ours, ready)
    poll.turn(0)  # it may have been written to before
    done.clear()
    return poll, theirs, done


def test_who_is_rung_ahead_stays_awake_for_the_message_and_not_for_its_ring(awake) -> None:
    poll, theirs, done = awake
    poll.meanwhile = lambda: (done.append("meanwhile"), theirs.send(b"", b"message"))
    for _ in range(3):
        theirs.ring()
        poll.turn(5.0)  # while it waits, the message comes
        poll.turn(5.0)  # the message's own ring
        assert done == ["meanwhile", "message", "nothing"]
        done.clear()


def test_who_was_rung_for_nothing_stays_awake_for_that_lane_once_until_it_speaks(awake) -> None:
    poll, theirs, done = awake
    for _ in range(3):
        theirs.ring()
        poll.turn(5.0)
    assert done == ["meanwhile", "nothing", "nothing", "nothing"]
    theirs.send(b"", b"message")
    poll.turn(5.0)
    theirs.ring()
    poll.turn(5.0)
    assert done[4:] == ["message", "meanwhile", "nothing"]


def test_who_waited_a_moment_ago_is_warm_and_does_no_work_meanwhile(awake, monkeypatch) -> None:
    monkeypatch.setattr("djinn_zmq.bus.poll.COLD_NS", 3600 * 10**9)
    poll, theirs, done = awake
    for text in (b"one", b"two"):
        theirs.ring()
        poll.turn(5.0)
        theirs.send(b"", text)
        poll.turn(5.0)
    assert done == ["meanwhile", "nothing", "one", "nothing", "two"]


def test_who_may_not_spin_now_does_not_stay_awake_for_who_rings_ahead(awake) -> None:
    poll, theirs, done = awake
    poll.may_spin = False
    theirs.ring()
    poll.turn(5.0)
    assert done == ["nothing"]


def test_who_is_rung_ahead_and_has_other_work_does_not_stay_awake_for_it(awake) -> None:
    poll, theirs, done = awake
    read, write = os.pipe()
    poll.watch(read, lambda: done.append(os.read(read, 1).decode()))
    theirs.ring()
    poll.turn(0)  # who asks so has work
    theirs.ring()
    os.write(write, b"x")
    poll.turn(5.0)
    assert sorted(done) == ["nothing", "nothing", "x"]
    os.close(read)
    os.close(write)


def test_who_expects_a_message_is_awake_when_it_comes_and_needs_no_ring(awake, ends) -> None:
    poll, theirs, done = awake
    poll.meanwhile = lambda: (done.append("meanwhile"), theirs.send(b"", b"answer", ring=False))
    for _ in range(3):
        poll.expect(ends[0])
        poll.turn(5.0)
        assert done == ["meanwhile", "answer"]
        done.clear()


def test_who_expects_a_message_takes_what_else_has_come_before_staying_awake_for_it(
    awake, ends, pair: tuple[Socket, Socket]
) -> None:
    poll, theirs, done = awake
    ours, other = pair
    poll.watch(ours, lambda: done.append(ours.recv().decode()))
    other.send(b"request")
    poll.meanwhile = lambda: (done.append("meanwhile"), theirs.send(b"", b"answer"))
    poll.expect(ends[0])
    while "answer" not in done:
        poll.turn(5.0)
    assert done == ["request", "meanwhile", "answer"]


def test_who_expects_in_vain_does_not_stay_awake_for_that_lane_again_until_it_speaks(
    awake, ends
) -> None:
    poll, theirs, done = awake
    for _ in range(3):
        poll.expect(ends[0])
        poll.turn(0.001)
    assert done == ["meanwhile"]
    theirs.send(b"", b"late")
    poll.turn(5.0)
    poll.expect(ends[0])
    poll.turn(0.001)
    assert done == ["meanwhile", "late", "meanwhile"]


def test_who_has_work_or_few_cpus_or_hears_the_lane_no_more_does_not_stay_awake_for_it(
    awake, ends
) -> None:
    poll, _, done = awake
    poll.expect(ends[0])
    poll.turn(0)  # who asks so has work
    poll.stays_awake = False
    poll.expect(ends[0])
    poll.turn(0.001)
    poll.stays_awake = True
    poll.expect(ends[0])
    poll.unwatch(ends[0])
    poll.turn(0.001)
    assert not done


def test_who_spins_waits_no_longer_than_was_said() -> None:
    poll = Poll(spin_us=30_000_000)
    begin = time.monotonic()
    for timeout_s in (0, 0.001, 0.02):
        poll.turn(timeout_s)
    assert time.monotonic() - begin < 15
    poll.close()


def test_who_may_not_spin_now_sleeps() -> None:
    poll = Poll(spin_us=1000)
    ours, theirs = lanes()
    poll.watch_lane(ours, ours.receive)
    poll.turn(0)
    asked: list[str] = []
    ours.unfinished = lambda: bool(asked.append("?"))
    poll.turn(0.001)
    assert asked
    asked.clear()
    poll.may_spin = False
    poll.turn(0.001)
    assert not asked
    poll.close()
    ours.close()
    theirs.close()


def test_who_spins_hears_a_lane_and_a_descriptor_all_the_same() -> None:
    poll = Poll(spin_us=1000)
    ours, theirs = lanes()
    read, write = os.pipe()
    heard: list[str] = []
    poll.watch_lane(ours, lambda: heard.append("lane") if ours.receive() else None)
    poll.watch(read, lambda: heard.append(os.read(read, 1).decode()))
    poll.turn(0)
    for _ in range(3):
        theirs.send(b"", b"x")
        while "lane" not in heard:
            poll.turn(5.0)
        os.write(write, b"d")
        while "d" not in heard:
            poll.turn(5.0)
        heard.clear()
    poll.close()
    ours.close()
    theirs.close()
    os.close(read)
    os.close(write)


def test_a_turn_ends_when_its_time_is_over(poll: Poll, pair: tuple[Socket, Socket]) -> None:
    poll.watch_used(Both(pair[0]), lambda: pytest.fail("nothing was sent"))
    poll.turn(0)
    poll.turn(0.01)


def test_what_is_unwatched_is_not_waited_for_any_more_and_may_be_watched_again(poll: Poll) -> None:
    read, write = os.pipe()
    called: list[bytes] = []
    poll.watch(read, lambda: called.append(os.read(read, 1)))
    os.write(write, b"12")
    poll.turn(5.0)
    poll.unwatch(read)
    poll.unwatch(read)  # it is not: nothing happens
    poll.turn(0)
    assert called == [b"1"]
    poll.watch(read, lambda: called.append(os.read(read, 1)))
    poll.turn(5.0)
    assert called == [b"1", b"2"]
    os.close(read)
    os.close(write)
