"""One suite for both transports: real sockets, a router and its dealers."""

import dataclasses
import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import zmq

from djinn_zmq.bus import dealer as dealer_room
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.router import Router
from djinn_zmq.errors import (
    AddressInUse,
    Busy,
    ProtocolError,
    RequestError,
    StartError,
    Unreachable,
)
from djinn_zmq.settings import KIB, MIB, Settings
from djinn_zmq.wire.codec import BUFFERS_LIMIT

SHALLOW = dataclasses.replace(Settings(), high_water=4)


@pytest.mark.parametrize("sizes", [(), (0,), (1, 0, 2 * KIB), (64 * KIB, 64 * KIB - 1), (MIB,)])
def test_a_message_goes_there_and_its_answer_comes_back(bus: Any, sizes: tuple[int, ...]) -> None:
    router, dealer = bus.bind(), bus.dealer()
    buffers = [os.urandom(size) for size in sizes]
    dealer.send(b"question", [memoryview(buffer) for buffer in buffers])
    route, frame, came = bus.arrives()
    assert frame == b"question" and type(frame) is bytes
    assert came == buffers
    router.send(route, b"answer", came)
    assert bus.answer(dealer) == (b"answer", buffers)


def test_where_nothing_came_nothing_is_received(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    assert router.receive() is None
    assert dealer.receive() is None
    dealer.socket.rcvtimeo = 1
    assert dealer.receive(wait=True) is None


def test_answers_go_to_the_dealer_that_asked(bus: Any) -> None:
    router = bus.bind()
    dealers = {b"%d" % number: bus.dealer() for number in range(5)}
    for name, dealer in dealers.items():
        dealer.send(name)
    asked = [bus.arrives() for _ in dealers]
    assert len({incoming.route for incoming in asked}) == 5
    for incoming in reversed(asked):
        router.send(incoming.route, incoming.frame)
    for name, dealer in dealers.items():
        assert bus.answer(dealer) == (name, [])


def test_who_polls_a_router_is_told_that_it_has_sent(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"hello")
    route = bus.arrives().route
    router.fd = 7
    router.send(route, b"answer")
    assert router.unheard == {7}  # to send may swallow the signal of what has come


def test_messages_of_one_dealer_keep_their_order(bus: Any) -> None:
    bus.bind()
    dealer = bus.dealer()
    sent = [(b"%d" % number, [b"x" * (number * 5000)]) for number in range(40)]
    for frame, buffers in sent:
        dealer.send(frame, buffers)
    assert [tuple(bus.arrives()[1:]) for _ in sent] == sent


def test_a_peer_that_is_gone_is_lost_and_the_others_are_served(bus: Any) -> None:
    router, gone, other = bus.bind(), bus.dealer(), bus.dealer()
    gone.send(b"1")
    route = bus.arrives().route
    other.send(b"2")
    others_route = bus.arrives().route
    gone.close()
    bus.until_lost(route)
    router.send(others_route, b"still here", [b"1", b"2"])
    assert bus.answer(other) == (b"still here", [b"1", b"2"])


def test_a_dealer_knows_that_its_router_is_gone_and_once_more_when_it_is_back(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"hello")
    bus.arrives()
    assert not dealer.lost()
    router.close()
    assert dealer.monitor.poll(int(bus.wait_s * 1000))
    assert dealer.lost() and dealer.lost()
    bus.bind(endpoint=bus.endpoint)
    assert dealer.monitor.poll(int(bus.wait_s * 1000))
    assert dealer.lost()  # what it was asked before has nobody who answers
    assert not dealer.lost()


def fill(send: Any, payload: bytes) -> int:
    """Send until it refuses. Returns how often it did not."""
    for count in range(500):
        try:
            send(b"more", [payload])
        except Busy:
            return count
    raise AssertionError("the queue has no bound")


def test_a_peer_that_does_not_read_makes_busy_and_nobody_waits(bus: Any) -> None:
    router, slow, other = bus.bind(SHALLOW), bus.dealer(SHALLOW), bus.dealer(SHALLOW)
    slow.send(b"1")
    slow_route = bus.arrives().route
    other.send(b"2")
    others_route = bus.arrives().route
    begin_s = time.monotonic()
    count = fill(lambda *message: router.send(slow_route, *message), bytes(MIB))
    assert time.monotonic() - begin_s < bus.wait_s
    router.send(others_route, b"not waiting")
    assert bus.answer(other) == (b"not waiting", [])
    for _ in range(count):
        frame, buffers = bus.answer(slow)
        assert frame == b"more" and len(buffers[0]) == MIB


def test_a_router_that_does_not_read_makes_its_dealers_busy(bus: Any) -> None:
    bus.bind(SHALLOW)
    dealer = bus.dealer(SHALLOW)
    count = fill(dealer.send, bytes(MIB))
    for _ in range(count):
        assert len(bus.arrives().buffers[0]) == MIB


def test_a_dealer_without_a_server_is_busy_when_its_queue_is_full(bus: Any) -> None:
    router = bus.bind(SHALLOW)
    router.socket.unbind(bus.endpoint)
    if bus.endpoint.startswith("ipc"):
        Path(bus.endpoint.removeprefix("ipc://")).touch()
    assert fill(bus.dealer(SHALLOW).send, b"") == SHALLOW.high_water


@pytest.mark.parametrize("frames", ["frame", "buffer"])
def test_a_frame_over_the_limit_ends_its_connection_and_no_other(bus: Any, frames: str) -> None:
    bus.bind(dataclasses.replace(Settings(), frame_limit=10_000))
    large, other = bus.dealer(), bus.dealer()
    other.send(b"before")
    assert bus.arrives().frame == b"before"
    large.send(b"fits", [bytes(10_000)])
    assert len(bus.arrives().buffers[0]) == 10_000
    if frames == "frame":
        large.send(bytes(10_001))
    else:
        large.send(b"small", [b"", bytes(10_001)])
    while not large.lost():
        assert large.monitor.poll(int(bus.wait_s * 1000)), "the connection is still there"
    other.send(b"after")
    assert bus.arrives().frame == b"after"
    large.send(b"better")
    assert bus.arrives().frame == b"better"


def test_more_buffers_than_any_message_has_are_not_kept_and_the_next_one_is_served(
    bus: Any,
) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"most", [b"x"] * BUFFERS_LIMIT)
    dealer.send(b"too many", [b"x"] * (BUFFERS_LIMIT + 1))
    dealer.send(b"far too many", [b"x"] * 10 * BUFFERS_LIMIT)
    dealer.send(b"next", [b"x"])
    came = [bus.arrives() for _ in range(4)]
    kept = [None if message.buffers is None else len(message.buffers) for message in came]
    assert kept == [BUFFERS_LIMIT, None, None, 1]

    router.send(came[0].route, b"most", [b"x"] * BUFFERS_LIMIT)
    router.send(came[0].route, b"too many", [b"x"] * (BUFFERS_LIMIT + 1))
    router.send(came[0].route, b"next")
    assert len(bus.answer(dealer)[1]) == BUFFERS_LIMIT
    assert dealer.socket.poll(int(bus.wait_s * 1000))
    with pytest.raises(ProtocolError, match="65 buffers: at most 64"):
        dealer.receive()
    assert bus.answer(dealer) == (b"next", [])


def test_a_dealer_says_who_it_is_once(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"1")
    dealer.send(b"2")
    route = bus.arrives().route
    address, user = router.identity(route)
    if bus.endpoint.startswith("ipc"):
        assert address.split(":")[-3:] == [str(os.getuid()), str(os.getgid()), str(os.getpid())]
    else:
        assert address == "127.0.0.1"
    assert user == ""
    bus.arrives()
    assert router.identity(route) is None
    router.forget(route)
    assert router.identity(route) is None
    dealer.send(b"3")
    bus.arrives()
    assert router.identity(route) == (address, user)
    router.forget(route)
    dealer.send(b"4")
    bus.arrives()
    router.forget(route)
    assert router.identity(route) is None


THIEF = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
socket.setsockopt(zmq.ROUTING_ID, bytes.fromhex(sys.argv[2]))
socket.connect(sys.argv[1])
for line in sys.stdin:
    socket.send(line.strip().encode())
"""


@pytest.mark.parametrize("found", ["by a message to it", "as the connection's end"])
@pytest.mark.parametrize("bus", ["ipc"], indirect=True)
def test_whoever_takes_a_dead_peers_route_is_not_taken_for_it(
    bus: Any, caplog: pytest.LogCaptureFixture, found: str
) -> None:
    router, owner = bus.bind(), bus.dealer()
    owner.send(b"mine")
    route = bus.arrives().route
    identity = router.identity(route)
    owner.close()
    if found == "by a message to it":
        bus.until_lost(route)
    else:
        bus.until_lost(route, unheard=True)
        router.doubt()
    thief = subprocess.Popen(
        [sys.executable, "-c", THIEF, bus.endpoint, route.hex()], stdin=subprocess.PIPE, text=True
    )
    assert thief.stdin is not None
    try:
        with caplog.at_level(logging.WARNING):
            thief.stdin.write("stolen\n")
            thief.stdin.flush()
            assert router.socket.poll(int(bus.wait_s * 1000))
            assert router.receive() is None
        assert "dropped a message" in caplog.text
        router.forget(route)
        thief.stdin.write("anew\n")
        thief.stdin.flush()
        assert bus.arrives().frame == b"anew"
        stranger = router.identity(route)
        assert stranger is not None and stranger != identity
        assert stranger[0].endswith(f":{thief.pid}")
    finally:
        thief.stdin.close()
        thief.wait(bus.wait_s)


def test_a_router_that_closed_leaves_no_socket_file(bus: Any, directory: Path) -> None:
    router = bus.bind()
    router.close()
    assert not list(directory.iterdir())


def test_a_router_that_closes_removes_no_file_that_stands_in_its_sockets_place(
    bus: Any, directory: Path
) -> None:
    router = bus.bind()
    for path in directory.iterdir():
        path.unlink()
    (directory / "mine").write_text("keep me")
    for end in router.endpoints:
        if end.startswith("ipc"):
            (directory / "mine").rename(end.removeprefix("ipc://"))
    router.close()
    assert [path.read_text() for path in directory.iterdir()] == ["keep me"]


def test_what_was_answered_before_a_router_closes_still_comes(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"hello")
    route = bus.arrives().route
    for number in range(32):  # more than goes out at once
        router.send(route, b"%d" % number, [bytes(MIB)])
    router.close(linger_ms=int(1000 * bus.wait_s))
    for number in range(32):
        assert dealer.socket.poll(int(1000 * bus.wait_s))
        assert bus.answer(dealer)[0] == b"%d" % number


@pytest.mark.parametrize("listening", [True, False])
def test_a_dealer_finds_out_whether_anybody_listens(directory: Path, listening: bool) -> None:
    path = directory / "left.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        if listening:
            server.listen()
        dealer = Dealer(f"ipc://{path}", Settings(), None)
        assert ("nobody listens" in dealer.why_silent()) is not listening
        dealer.close()


@pytest.mark.parametrize("listening", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_dealer_finds_out_whether_anybody_listens_at_a_port(host: str, listening: bool) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        try:
            server.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip("no IPv6 here")
        if listening:
            server.listen()
        dealer = Dealer(f"tcp://{host}:{server.getsockname()[1]}", Settings(), None)
        assert ("nobody listens" in dealer.why_silent()) is not listening
        dealer.close()


def test_a_port_in_use_is_refused_by_name(context: Any) -> None:
    first, second = Router(context, Settings(), None), Router(context, Settings(), None)
    endpoint = first.bind("tcp://127.0.0.1:0")
    assert not endpoint.endswith(":0")
    assert first.endpoints == [endpoint]
    with pytest.raises(AddressInUse, match=f"{endpoint} is in use by another process"):
        second.bind(endpoint)
    assert second.endpoints == []
    first.close()
    second.close()


@pytest.mark.parametrize(
    "endpoint", ["tcp://192.0.2.1:0", "tcp://127.0.0.1:99999", "ipc:///no/such/directory/bus", "x"]
)
def test_an_address_that_cannot_be_bound_is_refused_by_name(context: Any, endpoint: str) -> None:
    router = Router(context, Settings(), None)
    with pytest.raises(StartError, match=f"cannot bind {endpoint}"):
        router.bind(endpoint)
    router.close()


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "ipc://",
        "tcp://",
        "/tmp/socket",
        "http://localhost:1",
        "inproc://x",
        "tcp",
        "ipc://a\0b",
    ],
)
def test_an_endpoint_of_another_kind_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(RequestError, match="is not understood: use ipc://PATH or tcp://HOST:PORT"):
        Dealer(endpoint, Settings(), None)


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("tcp://localhost", ": Invalid argument: use tcp://HOST:PORT"),
        ("tcp://localhost:65536", ": a port is at most 65535"),
        ("tcp://localhost:port", ": Invalid argument: use tcp://HOST:PORT"),
    ],
)
def test_an_endpoint_that_is_no_address_is_refused_by_name(endpoint: str, why: str) -> None:
    with pytest.raises(RequestError, match=f"cannot connect to {endpoint}{why}"):
        Dealer(endpoint, Settings(), None)


def test_a_host_that_has_no_address_is_named() -> None:
    dealer = Dealer("tcp://no-such-host.invalid:5556", Settings(), None)
    assert '"no-such-host.invalid" cannot be resolved' in dealer.why_silent()
    dealer.close()


@pytest.mark.parametrize("path", ["/no/such/socket", "/" + "x" * 5000, "/etc/passwd/socket"])
def test_an_ipc_endpoint_without_a_socket_file_says_so_at_once(path: str) -> None:
    with pytest.raises(Unreachable, match="start one with 'djinn serve'"):
        Dealer(f"ipc://{path}", Settings(), None)


def interrupted_at(step: int, work: Callable[[], object]) -> bool:
    """Have a KeyboardInterrupt come at that step of the dealer's own Python in *work*. False: it has fewer."""
    left = step

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != dealer_room.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                sys.settrace(before)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_no_half_message_is_sent_by_who_is_interrupted(bus: Any) -> None:
    bus.bind()
    dealer, buffers = bus.dealer(), [b"one", bytes(64 * KIB), b"three"]
    steps = 0
    while interrupted_at(steps, lambda: dealer.send(b"broken off", buffers)):
        steps += 1
        dealer.send(b"next")
        while (arrived := bus.arrives()).frame != b"next":
            assert (arrived.frame, arrived.buffers) == (b"broken off", buffers)
        assert not arrived.buffers
    assert steps > 10


def test_what_is_left_of_a_message_when_its_reader_is_interrupted_begins_no_other(bus: Any) -> None:
    router, dealer = bus.bind(), bus.dealer()
    dealer.send(b"hello")
    route = bus.arrives().route
    steps = 0
    while True:
        router.send(route, b"broken off", [b"one", b"two"])
        router.send(route, b"next", [b"three"])
        assert dealer.socket.poll(int(bus.wait_s * 1000))
        interrupted = interrupted_at(steps, dealer.receive)
        answer = bus.answer(dealer)
        if answer == (b"broken off", [b"one", b"two"]):  # it had not been begun
            answer = bus.answer(dealer)
        assert answer == (b"next", [b"three"])
        if not interrupted:
            break
        steps += 1
    assert steps > 10


def test_a_dealer_that_there_are_no_descriptors_for_says_so_and_leaves_none_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(zmq.Socket, "get_monitor_socket", refuses)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        Unreachable, match="cannot connect to tcp://.*: Too many open files"
    ) as told:
        Dealer("tcp://127.0.0.1:1", Settings(), None)
    assert len(os.listdir("/proc/self/fd")) == before  # though what was raised still refers to it
    del told
