import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.lease import PACKET_LIMIT, LeaseSocket, close_all
from djinn_zmq.errors import AccessDenied, Busy, Lost, ProtocolError, Unreachable
from djinn_zmq.wire.codec import encode_lease
from djinn_zmq.wire.messages import (
    Broken,
    Farewell,
    Granted,
    Join,
    Listen,
    Refused,
    Retire,
    Share,
    Want,
)

Ends = tuple[LeaseSocket, LeaseSocket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The server's end, which never waits, and the engine's, which does."""
    ours, theirs = lease_bus.pair()
    theirs.settimeout(10)
    server, engine = ours, LeaseSocket(theirs)
    yield server, engine
    server.close()
    engine.close()


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.write(fd, b"shared")
    yield fd
    os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "packet", [Join(b"t"), Want(1), Granted(2), Retire(3), Refused("busy", "")]
)
def test_a_packet_arrives_as_it_was_sent(ends: Ends, packet: object) -> None:
    for sender, receiver in (ends, ends[::-1]):
        sender.send(packet)
        assert receiver.receive() == (packet, [])


def test_a_descriptor_arrives_beside_its_packet_and_is_not_inherited(
    ends: Ends, memory: int
) -> None:
    server, engine = ends
    engine.send(Share(), memory)
    engine.send(Want(1))
    packet, (fd,) = server.receive()
    assert packet == Share()
    assert os.pread(fd, 10, 0) == b"shared"
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert server.receive() == (Want(1), [])


def test_where_nothing_came_the_server_does_not_wait(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        ends[0].receive()


def test_a_question_is_answered_with_a_number_and_a_descriptor(ends: Ends, memory: int) -> None:
    server, engine = ends
    server.send(Granted(7), memory)
    granted, fd = engine.ask(Want(7))
    assert server.receive() == (Want(7), [])
    assert granted == Granted(7) and fd is not None
    assert os.pread(fd, 10, 0) == b"shared"
    os.close(fd)


def test_a_refusal_is_raised_as_what_it_was(ends: Ends) -> None:
    server, engine = ends
    server.send(Refused("busy", "come back later"))
    with pytest.raises(Busy, match="come back later"):
        engine.ask(Want(7))
    server.send(Granted(8))
    assert engine.ask(Want(8)) == (Granted(8), None)


def fill(server: LeaseSocket) -> None:
    """No more finds room on the way to the other end."""
    with pytest.raises(BlockingIOError):
        while True:
            server.send(Retire(1))


def test_an_answer_that_finds_no_room_is_kept_with_its_descriptor_and_nobody_waits(
    ends: Ends, memory: int
) -> None:
    server, engine = ends
    before = open_fds()
    fill(server)
    told: list[str] = []
    server.on_full = lambda: told.append("full")
    server.post(Granted(5), memory)
    server.post(Refused("busy", ""))
    assert told and not server.flush()

    def flush() -> None:
        while not server.flush():
            pass

    thread = threading.Thread(target=flush)
    thread.start()
    granted, fd = engine.ask(Want(5))
    thread.join()
    assert granted == Granted(5) and fd is not None and os.pread(fd, 10, 0) == b"shared"
    os.close(fd)
    with pytest.raises(Busy):
        engine.ask(Want(6))
    assert open_fds() == before


def test_what_waits_for_room_is_not_overtaken_and_closed_where_it_never_comes(
    ends: Ends, memory: int
) -> None:
    server, engine = ends
    before = open_fds()
    fill(server)
    server.post(Granted(5), memory)
    engine.receive()
    server.post(Granted(6))
    while not server.flush():
        engine.receive()
    answers = [packet for packet, fds in engine.news() if not close_all(fds)]
    assert [one for one in answers if one != Retire(1)] == [Granted(5), Granted(6)]
    fill(server)
    server.post(Granted(7), memory)
    server.close()
    assert open_fds() == before - 1


def test_an_answer_with_more_than_one_descriptor_leaves_none_open(ends: Ends, memory: int) -> None:
    server, engine = ends
    before = open_fds()
    server.send(Granted(5), memory, memory)
    granted, fd = engine.ask(Want(5))
    assert granted == Granted(5) and fd is not None
    os.close(fd)
    assert open_fds() == before


def test_the_answer_to_a_question_that_was_given_up_is_not_taken_for_the_next_one(
    ends: Ends, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, engine = ends
    before = open_fds()

    def interrupted() -> None:  # by a Ctrl-C
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.ask(Want(1))
    server.send(Granted(1), memory)
    server.send(Broken(3, "news"))
    server.send(Granted(2))
    assert engine.ask(Want(2)) == (Granted(2), None)
    assert engine.take_late() == [(Broken(3, "news"), [])]
    assert open_fds() == before


def test_news_that_cross_a_question_are_kept_for_later(ends: Ends) -> None:
    server, engine = ends
    for packet in (Retire(1), Retire(2), Granted(5)):
        server.send(packet)
    assert engine.ask(Want(5)) == (Granted(5), None)
    assert engine.take_late() == [(Retire(1), []), (Retire(2), [])]
    assert engine.take_late() == []


def test_the_end_of_either_side_is_the_loss_of_it(ends: Ends) -> None:
    server, engine = ends
    engine.close()
    with pytest.raises(Lost, match="is gone"):
        server.receive()
    with pytest.raises(Lost, match="is gone"):
        server.send(Retire(1))


def test_an_end_that_dies_with_unread_packets_is_lost_when_its_last_words_are_read(
    ends: Ends,
) -> None:
    server, engine = ends
    server.send(Retire(1))
    engine.send(Want(1))
    engine.send(Farewell("its device is of no use"))
    engine.close()
    assert server.receive() == (Want(1), [])
    assert server.receive() == (Farewell("its device is of no use"), [])
    with pytest.raises(Lost):
        server.receive()


def test_a_peer_that_does_not_read_does_not_make_the_server_wait(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        for number in range(1_000_000):
            ends[0].send(Retire(number))


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(ends: Ends) -> None:
    server, engine = ends
    engine.socket.settimeout(0.01)
    with pytest.raises(Lost, match="did not answer in 0.01 s"):
        engine.ask(Want(1))
    with pytest.raises(Lost):
        server.receive(), server.send(Granted(1))
    with pytest.raises(Lost):
        engine.ask(Want(2))


@pytest.mark.parametrize(
    "data",
    [b"\xc1", b"hello", encode_lease(Want(1))[:-1], encode_lease(Want(1)) + b"\0", b"\x91\x09"],
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_no_packet_is_refused_and_its_descriptors_closed(
    ends: Ends, memory: int, data: bytes, count: int
) -> None:
    server, engine = ends
    before = open_fds()
    socket.send_fds(engine.socket, [data], [memory] * count)
    with pytest.raises(ProtocolError, match="not a packet"):
        server.receive()
    assert open_fds() == before
    engine.send(Want(1))
    assert server.receive() == (Want(1), [])


def test_a_packet_over_the_limit_is_refused(ends: Ends) -> None:
    ends[1].send(Join(bytes(PACKET_LIMIT)))
    with pytest.raises(ProtocolError):
        ends[0].receive()


@pytest.mark.parametrize("count", [4, 16, 100])
def test_more_descriptors_than_a_lane_has_are_closed(ends: Ends, memory: int, count: int) -> None:
    server, engine = ends
    before = open_fds()
    socket.send_fds(engine.socket, [encode_lease(Share())], [memory] * count)
    _, fds = server.receive()
    assert open_fds() == before + 3
    close_all(fds)
    assert len(fds) == 3


def test_descriptors_beside_an_empty_packet_are_closed(ends: Ends, memory: int) -> None:
    server, engine = ends
    before = open_fds()
    socket.send_fds(engine.socket, [b""], [memory] * 2)
    with pytest.raises(Lost):
        server.receive()
    assert open_fds() == before


@pytest.mark.parametrize("answer", [Refused("busy", ""), Retire(1)])
def test_descriptors_beside_an_answer_that_has_none_are_closed(
    ends: Ends, memory: int, answer: Refused | Retire
) -> None:
    server, engine = ends
    before = open_fds()
    server.send(answer, memory)
    server.send(Refused("busy", ""))
    with pytest.raises(Busy):
        engine.ask(Want(1))
    for _, fds in engine.take_late():  # news keep theirs until somebody reads them
        close_all(fds)
    assert open_fds() == before


def test_news_bring_their_descriptors_and_an_end_closes_what_nobody_read(
    ends: Ends, memory: int
) -> None:
    server, engine = ends
    before = open_fds()
    server.send(Listen(1, "uid:0"), memory, memory, memory)
    server.send(Granted(5))
    assert engine.ask(Want(5)) == (Granted(5), None)
    assert open_fds() == before + 3
    engine.close()
    assert open_fds() == before - 1


def test_news_are_there_for_who_asks_without_waiting(ends: Ends) -> None:
    server, engine = ends
    assert engine.news() == []
    server.send(Broken(1, "gone"))
    server.send(Broken(2, "gone"))
    assert engine.news() == [(Broken(1, "gone"), []), (Broken(2, "gone"), [])]
    server.close()
    with pytest.raises(Lost):
        engine.news()


# ---- by path


def test_the_listening_socket_is_its_users_alone_whatever_the_umask(directory: Path) -> None:
    path = directory / "lease"
    mask = os.umask(0)
    try:
        listener = lease_bus.listen(path)
        assert os.umask(0) == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


def test_a_socket_file_that_a_dead_server_left_is_replaced(directory: Path) -> None:
    path = directory / "lease"
    lease_bus.listen(path).close()
    assert path.exists()
    lease_bus.listen(path).close()


def test_a_place_that_cannot_be_listened_at_leaves_nothing_open(directory: Path) -> None:
    with pytest.raises(OSError):
        lease_bus.listen(directory / "no" / "such" / "place")


def test_a_client_joins_with_its_token_and_both_see_whose_process_it_is(directory: Path) -> None:
    path = directory / "lease"
    with lease_bus.listen(path) as listener:
        # The answer is there before the question: one thread plays both sides.
        client_socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client_socket.connect(os.fspath(path))
        server = LeaseSocket(listener.accept()[0])
        client = LeaseSocket(client_socket)
        server.send(Granted(0))
        assert client.ask(Join(b"token")) == (Granted(0), None)
        assert server.receive() == (Join(b"token"), [])
        assert client.peer_uid() == server.peer_uid() == os.getuid()
        client.close()
        server.close()


class Answering:
    """A process that accepts one client and answers its first packet."""

    def __init__(self, listener: socket.socket, answer: bytes) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            listener.setblocking(True)
            accepted, _ = listener.accept()
            accepted.recv(PACKET_LIMIT)
            if answer:
                accepted.send(answer)
                accepted.recv(PACKET_LIMIT)
            os._exit(0)

    def wait(self) -> None:
        assert os.waitpid(self.pid, 0)[1] == 0


def test_connecting_waits_until_the_server_lets_in(directory: Path) -> None:
    with lease_bus.listen(directory / "lease") as listener:
        server = Answering(listener, encode_lease(Granted(0)))
        client = LeaseSocket.connect(directory / "lease", b"token")
        assert client.peer_uid() == os.getuid()
        client.close()
        server.wait()


def test_connecting_raises_what_the_server_refuses_with(directory: Path) -> None:
    with lease_bus.listen(directory / "lease") as listener:
        server = Answering(listener, encode_lease(Refused("access", "no such token")))
        with pytest.raises(AccessDenied, match="no such token"):
            LeaseSocket.connect(directory / "lease", b"token")
        server.wait()


def test_a_server_that_hangs_up_while_one_connects_is_lost(directory: Path) -> None:
    with lease_bus.listen(directory / "lease") as listener:
        server = Answering(listener, b"")
        with pytest.raises(Lost, match=f"the server at {directory}/lease is gone"):
            LeaseSocket.connect(directory / "lease", b"token")
        server.wait()


@pytest.mark.parametrize("name", ["nothing", "file", "dead", "x" * 300])
def test_where_nobody_listens_it_says_so(directory: Path, name: str) -> None:
    (directory / "file").touch()
    lease_bus.listen(directory / "dead").close()
    with pytest.raises(Unreachable, match=r"no lease socket at .*: \w+"):
        LeaseSocket.connect(directory / name, b"token")
