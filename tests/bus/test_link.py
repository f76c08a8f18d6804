"""The link: an envelope in front of each message, and two ends that wait differently."""

import dataclasses
import os
import select
import threading
from collections.abc import Iterator
from typing import IO

import pytest

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.link import Link
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.settings import KIB, MIB, Settings

Ends = tuple[Link, Link, IO[bytes]]
SHALLOW = dataclasses.replace(Settings(), high_water=4)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The server's end and the engine's, and what the engine takes for the server's life."""
    alive, life = (os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    server, theirs = Link.create(SHALLOW)
    engine = Link(Lane(theirs, SHALLOW, first=False), alive.fileno())
    yield server, engine, life
    engine.close()
    server.close()
    alive.close()
    life.close()


@pytest.mark.parametrize("sizes", [(), (0,), (1, 64 * KIB, 0), (MIB, 64 * KIB - 1)])
@pytest.mark.parametrize("envelope", [b"", b"i\0route"])
def test_a_message_arrives_as_it_was_sent_in_both_directions(
    ends: Ends, sizes: tuple[int, ...], envelope: bytes
) -> None:
    buffers = [bytes([len(sizes)]) * size for size in sizes]
    for sender, receiver in (ends[:2], ends[1::-1]):
        sender.send(envelope, b"frame", [memoryview(buffer) for buffer in buffers])
        assert receiver.receive() == (envelope, b"frame", buffers)
        assert receiver.receive() is None


def test_an_engine_that_does_not_read_makes_busy_and_loses_nothing(
    ends: Ends,
) -> None:
    server, engine, _ = ends
    sent = 0
    with pytest.raises(Busy, match="the engine's queue is full"):
        while sent < 100_000:
            server.send(b"e", b"%d" % sent, [bytes(64 * KIB)])
            sent += 1
    for _ in range(100):  # but what the server has to say itself is kept, behind the rest
        server.send(b"", b"%d" % sent)
        sent += 1
    taken = 0
    while taken < sent:
        pieces = engine.receive()
        if pieces is None:
            server.receive()  # its bell has told it of room
            continue
        assert pieces[1] == b"%d" % taken
        taken += 1


def test_what_can_wait_wakes_nobody_and_comes_with_the_next_ring(ends: Ends) -> None:
    server, engine, _ = ends
    woken = select.epoll()  # as a server waits for it
    woken.register(server.lane, select.EPOLLIN | select.EPOLLET)
    assert not woken.poll(0)
    engine.post(b"notice")
    assert not woken.poll(0)
    engine.send(b"e", b"answer")
    assert woken.poll(0)
    woken.close()
    assert [server.receive() for _ in "12"] == [(b"", b"notice", []), (b"e", b"answer", [])]


def test_an_engine_waits_for_a_server_that_is_slow_to_read(ends: Ends) -> None:
    server, engine, _ = ends
    taken: list[bytes] = []

    def read() -> None:
        while len(taken) < 200:
            pieces = server.receive()
            if pieces is not None:
                taken.append(pieces[1])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        engine.send(b"e", b"%d" % number, [bytes(64 * KIB)])
    while not engine.lane.flush():
        pass
    reader.join()
    assert taken == [b"%d" % number for number in range(200)]


def test_an_engine_whose_server_is_gone_does_not_wait(ends: Ends) -> None:
    _, engine, life = ends
    life.close()
    with pytest.raises(Lost, match="the server is gone"):
        for _ in range(1000):
            engine.send(b"e", b"frame", [bytes(64 * KIB)])


def test_what_an_engine_sent_before_its_end_is_still_there(ends: Ends) -> None:
    server, engine, _ = ends
    engine.send(b"e", b"last words")
    engine.close()
    assert server.receive() == (b"e", b"last words", [])
