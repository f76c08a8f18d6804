import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from djinn_zmq.bus.link import Link, Parcel
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.settings import KIB, MIB, Settings

SHALLOW = dataclasses.replace(Settings(), high_water=4)
WAIT_MS = 10_000


@pytest.fixture
def ends(context: Any, directory: Path) -> Iterator[tuple[Link, Link]]:
    """The server's end and the engine's."""
    server = Link(context, directory / "link", SHALLOW, bind=True)
    engine = Link(context, directory / "link", SHALLOW, bind=False)
    engine.send(b"", b"ready")
    assert arrives(server).frame == b"ready"
    yield server, engine
    engine.close()
    server.close()
    assert not list(directory.iterdir())


def arrives(link: Link) -> Parcel:
    assert link.socket.poll(WAIT_MS), "nothing came"
    parcel = link.receive()
    assert parcel is not None
    return parcel


@pytest.mark.parametrize("sizes", [(), (0,), (1, 64 * KIB, 0), (MIB, 64 * KIB - 1)])
@pytest.mark.parametrize("envelope", [b"", b"i\0route"])
def test_a_parcel_arrives_as_it_was_sent_in_both_directions(
    ends: tuple[Link, Link], sizes: tuple[int, ...], envelope: bytes
) -> None:
    buffers = [bytes([len(sizes)]) * size for size in sizes]
    for sender, receiver in (ends, ends[::-1]):
        sender.send(envelope, b"frame", [memoryview(buffer) for buffer in buffers])
        assert arrives(receiver) == (envelope, b"frame", buffers)
        assert receiver.receive() is None


def test_an_engine_that_does_not_read_makes_busy(ends: tuple[Link, Link]) -> None:
    server, engine = ends
    sent = 0
    with pytest.raises(Busy, match="the engine's queue is full"):
        while sent < 100_000:
            server.send(b"", b"frame", [bytes(64 * KIB)])
            sent += 1
    for _ in range(sent):
        assert len(arrives(engine).buffers[0]) == 64 * KIB


def test_where_no_engine_has_come_the_server_does_not_wait(context: Any, directory: Path) -> None:
    link = Link(context, directory / "link", SHALLOW, bind=True)
    with pytest.raises(Busy):
        link.send(b"", b"frame")
    link.close()


@pytest.mark.parametrize("buffers", [[], [b"1"], [b"1", b"2"]])
def test_an_engine_that_dies_in_the_middle_of_a_message_is_lost_and_nobody_waits(
    ends: tuple[Link, Link], buffers: list[bytes]
) -> None:
    server, engine = ends
    send = server._send

    def send_and_outlive(frame: bytes, *flags: Any, **options: Any) -> None:
        send(frame, *flags, **options)
        if not engine.socket.closed:
            monitor = server.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            engine.close()
            assert monitor.poll(WAIT_MS)
            server.socket.disable_monitor()
            monitor.close(linger=0)
            while server.socket.poll(10, zmq.POLLOUT):
                pass  # its pipe ends a moment after its connection

    server._send = send_and_outlive
    with pytest.raises(Lost, match="the other end of the link is gone"):
        server.send(b"", b"frame", buffers)


def test_a_new_engine_at_the_same_place_gets_whole_messages_only(
    ends: tuple[Link, Link], context: Any, directory: Path
) -> None:
    server, engine = ends
    engine.close()
    server.close()
    server = Link(context, directory / "link", SHALLOW, bind=True)
    engine = Link(context, directory / "link", SHALLOW, bind=False)
    engine.send(b"", b"ready again")
    assert arrives(server).frame == b"ready again"
    server.send(b"e", b"f", [b"b"])
    assert arrives(engine) == (b"e", b"f", [b"b"])
    engine.close()
    server.close()


def test_what_was_sent_before_the_end_still_arrives_where_it_may_linger(
    ends: tuple[Link, Link],
) -> None:
    server, engine = ends
    engine.send(b"e", b"last words")
    engine.close(linger_ms=WAIT_MS)
    assert arrives(server).frame == b"last words"
