"""Waiting for sockets and descriptors: nobody is missed, and nobody starves."""

import os
from collections.abc import Iterator

import pytest
import zmq

from djinn_zmq.bus.poll import Poll, has_message

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
    poll.watch(ours, lambda _: taken.append(ours.recv()))
    poll.turn(5.0)
    assert taken == [b"early"]


def test_messages_whose_signal_a_send_swallowed_are_heard(
    poll: Poll, pair: tuple[Socket, Socket]
) -> None:
    ours, theirs = pair
    taken: list[bytes] = []
    poll.watch(ours, lambda _: taken.append(ours.recv()), sent_on=True)
    for number in range(200):
        theirs.send(b"%d" % number)
        ours.send(b"anything")  # reads the socket's commands, its signal among them
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

    def busy(count: int) -> None:
        ours.recv()
        theirs.send(b"again")

    poll.watch(ours, busy, sent_on=True)
    poll.watch(read, lambda _: heard.append(os.read(read, 1)))
    theirs.send(b"first")
    os.write(write, b"x")
    for _ in range(5):
        poll.turn(5.0)
    assert heard == [b"x"]
    assert has_message(ours)
    poll.unwatch(read)
    os.close(read)
    os.close(write)


def test_what_is_unwatched_by_one_is_not_called_by_the_same_turn(poll: Poll) -> None:
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []

    def ready(read: int, other: int) -> None:
        called.append(read)
        poll.unwatch(other)

    (first, _), (second, _) = pipes
    poll.watch(first, lambda _: ready(first, second))
    poll.watch(second, lambda _: ready(second, first))
    for _, write in pipes:
        os.write(write, b"x")
    poll.turn(5.0)
    assert len(called) == 1
    for ends in pipes:
        for end in ends:
            os.close(end)


def test_a_turn_ends_when_its_time_is_over(poll: Poll, pair: tuple[Socket, Socket]) -> None:
    poll.watch(pair[0], lambda _: pytest.fail("nothing was sent"), sent_on=True)
    poll.turn(0)
    poll.turn(0.01)
