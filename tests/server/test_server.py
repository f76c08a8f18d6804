"""The server's loop turned by hand, with an engine that is a link and a socket."""

import contextlib
import dataclasses
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.bus.link import Link
from djinn_zmq.errors import Closed, Lost, ProtocolError, RunError, UnknownSession
from djinn_zmq.memory.arena import OwnArena
from djinn_zmq.memory.ring import HEAD
from djinn_zmq.server.registry import Session
from djinn_zmq.server.server import Server
from djinn_zmq.settings import KIB, Settings
from djinn_zmq.wire import codec, messages, states
from djinn_zmq.wire.messages import Flag, Keep, ModelInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor, inline
from djinn_zmq.wire.tiers import Kept

TINY = ModelInfo("tiny", "tiny", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")
TURN_S = 0.05


class Served:
    """A server that has bound everything, and the other ends of its engine."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(arena=64 * KIB)
        path = folder / "d.sock"
        self.server = Server(path, settings, devices=["cpu"], tcp="tcp://127.0.0.1:*")
        self.ipc, self.tcp = self.server.endpoints()
        (self.engine,) = self.server.fleet.engines
        self.engine.link, ends = Link.create(settings)
        self.link = Link(Lane(ends, settings, first=False), server=-1)
        self.engine.lease, theirs = lease_bus.pair()
        theirs.setblocking(False)
        self.lease = LeaseSocket(theirs)
        self.engine.state = states.Engine.READY
        self.engine.sources["tiny"] = "tiny"
        self.engine.models["tiny"] = TINY
        self.server._watch_engine(self.engine)
        self.dealers: list[Dealer] = []

    def connect(self, endpoint: str) -> Dealer:
        dealer = Dealer(endpoint, Settings(), None)
        self.dealers.append(dealer)
        return dealer

    def turn(self) -> None:
        self.server._poll.turn(TURN_S)

    def ask(self, dealer: Dealer, op: Op, meta: Any, buffers: Any = (), **header: Any) -> Any:
        dealer.send(codec.encode(op, meta, request=1, buffers=len(buffers), **header), buffers)
        return self.answer(dealer)

    def answer(self, dealer: Dealer) -> Any:
        for _ in range(200):
            self.turn()
            if (frames := dealer.receive()) is None:
                continue
            message = codec.decode(*frames)
            if message.header.flags & Flag.ERROR:
                raise codec.error_of(message)
            if not message.header.flags & Flag.PROGRESS:
                return message.meta
        raise AssertionError("no answer")

    def until(self, done: Callable[[], object]) -> None:
        for _ in range(200):
            if done():
                return
            self.turn()
            self.server._do_what_is_due()
        raise AssertionError("it does not happen")

    def close(self) -> None:
        for dealer in self.dealers:
            dealer.close()
        self.link.close()
        self.lease.close()
        if self.server.path.exists():
            self.server.close()


@pytest.fixture
def served() -> Iterator[Served]:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(prefix="djs") as folder:
        served = Served(Path(folder))
        yield served
        served.close()
        assert os.listdir(folder) == []
    assert len(os.listdir("/proc/self/fd")) <= before


def deaths_of(served: Served) -> list[str]:
    """Why engines died, from now on; none is started again."""
    deaths: list[str] = []
    served.server.lanes.end_of_engine = lambda _, reason: deaths.append(reason)  # type: ignore[method-assign]
    served.server.fleet.on_death = lambda engine: engine.bury()[1]  # type: ignore[assignment,method-assign]
    return deaths


def keep(served: Served, session: int, numbers: range, arena: int = 1) -> None:
    """The engine says, without a ring yet, that these are kept."""
    for number in numbers:
        kept = Kept(number, session, 1, 2, Tensor("float32", (1, 1, 1), Slot(arena, 0, 1)))
        meta = Keep(inline(np.zeros((1, 1), np.int64)), (kept,))
        served.link.post(codec.encode(Op.KEEP, meta, session=session))


def joined(served: Served, dealer: Dealer) -> LeaseSocket:
    """What shares memory with the server from now on: over a socket that does not wait."""
    welcome = served.ask(dealer, Op.HELLO, messages.Hello("", 0))
    sock = lease_bus.socket.socket(lease_bus.socket.AF_UNIX, lease_bus.socket.SOCK_SEQPACKET)
    sock.connect(welcome.lease_path)
    sock.setblocking(False)
    lease = LeaseSocket(sock)
    lease.send(messages.Join(welcome.token))
    assert told(served, lease) == messages.Granted(0, "")
    return lease


def told(served: Served, lease: LeaseSocket) -> Any:
    for _ in range(200):
        served.turn()
        try:
            packet, fds = lease.receive()
        except BlockingIOError:
            continue
        lease_bus.close_all(fds)
        return packet
    raise AssertionError("no packet")


def last_word(client: Dealer) -> Closed:
    """What a server that has closed still said."""
    client.socket.rcvtimeo = 10_000
    frames = client.receive(wait=True)
    assert frames is not None
    error = codec.error_of(codec.decode(*frames))
    assert isinstance(error, Closed)
    return error


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(64)]  # takes the gaps, too
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        lease_bus.close_all(fillers)


def test_what_an_engine_has_said_before_is_heard_however_much_it_is(served: Served) -> None:
    client = served.connect(served.ipc)
    lease = joined(served, client)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 201))
    assert served.ask(client, Op.RELEASE, messages.Release((200,)), session=session)
    lease.close()


def test_an_arena_is_handed_over_whose_checkpoint_the_server_is_about_to_hear_of(
    served: Served,
) -> None:
    client = served.connect(served.ipc)
    lease = joined(served, client)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    arena = OwnArena.create(4 * KIB, "test")
    served.lease.send(messages.Share(), arena.fd)
    granted = told(served, served.lease)
    keep(served, session, range(1, 2), granted.arena)
    lease.send(messages.Want(granted.arena))
    served.server.arenas.serve()  # it may look there first
    assert told(served, lease) == granted
    arena.close()
    lease.close()


def test_who_is_found_gone_while_it_is_answered_over_its_lease_socket_is_seen_off_once(
    served: Served,
) -> None:
    client = served.connect(served.ipc)
    lease = joined(served, client)
    (peer,) = served.server.registry.peers.values()
    arena = OwnArena.create(4 * KIB, "test")
    served.lease.send(messages.Share(), arena.fd)
    granted = told(served, served.lease)
    client.close()
    with pytest.raises(zmq.ZMQError):
        for _ in range(1000):  # until libzmq knows it, and nobody else
            peer.router.socket.send_multipart([peer.route, b"?"], zmq.DONTWAIT)
            peer.router.socket.poll(5)
    served.link.send(peer.envelope, codec.encode(Op.PING, messages.Pong("idle"), flags=Flag.REPLY))
    lease.send(messages.Want(granted.arena))
    served.server.arenas.serve()
    assert not served.server.registry.peers
    with pytest.raises(Lost):
        told(served, lease)
    arena.close()
    lease.close()


def test_who_is_found_gone_while_another_is_answered_is_seen_off_once(served: Served) -> None:
    clients = [served.connect(served.ipc) for _ in range(2)]
    leases = [joined(served, client) for client in clients]
    first, second = served.server.registry.peers.values()
    arena = OwnArena.create(4 * KIB, "test")
    served.lease.send(messages.Share(), arena.fd)
    granted = told(served, served.lease)
    leases[0].send(messages.Want(granted.arena))
    leases[1].close()  # both are heard at once
    clients[1].close()
    with pytest.raises(zmq.ZMQError):
        for _ in range(1000):  # until libzmq knows it, and nobody else
            second.router.socket.send_multipart([second.route, b"?"], zmq.DONTWAIT)
            second.router.socket.poll(5)
    pong = codec.encode(Op.PING, messages.Pong("idle"), flags=Flag.REPLY)
    served.link.send(second.envelope, pong)
    served.server.arenas.serve()
    assert list(served.server.registry.peers.values()) == [first]
    assert isinstance(told(served, leases[0]), messages.Refused)
    arena.close()
    leases[0].close()


def test_who_there_is_no_descriptor_for_is_turned_away_from_shared_memory_at_once(
    served: Served,
) -> None:
    client = served.connect(served.ipc)
    path = served.ask(client, Op.HELLO, messages.Hello("", 0)).lease_path
    kind = lease_bus.socket.AF_UNIX, lease_bus.socket.SOCK_SEQPACKET
    socks = [lease_bus.socket.socket(*kind) for _ in range(2)]
    for sock in socks:
        sock.settimeout(10)
        sock.connect(path)
    with no_descriptors_left():
        for _ in socks:
            served.server.arenas.serve()
    assert [sock.recv(1) for sock in socks] == [b"", b""]
    for sock in socks:
        sock.close()
    joined(served, client).close()


def test_who_waits_for_a_model_is_told_that_the_server_stops(served: Served) -> None:
    client = served.connect(served.tcp)
    served.engine.models.clear()
    client.send(codec.encode(Op.OPEN, messages.Open("tiny"), request=1))
    served.until(lambda: any(served.server.fleet._opening.values()))
    served.server.close()
    assert "the server stops" in str(last_word(client))


def test_who_sends_an_upload_is_told_that_the_server_stops(served: Served) -> None:
    client = served.connect(served.tcp)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    client.send(codec.encode(Op.UPLOAD, messages.Upload(64), request=1, session=session))
    served.until(served.server.arenas.staged)
    served.server.close()
    assert "the server stops" in str(last_word(client))


def test_a_piece_of_an_upload_that_is_refused_is_answered(served: Served) -> None:
    client = served.connect(served.tcp)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    client.send(codec.encode(Op.UPLOAD, messages.Upload(64), request=1, session=session))
    piece = messages.Chunk(32)
    with pytest.raises(ProtocolError, match="0 of 64 bytes have come"):
        served.ask(client, Op.CHUNK, piece, [bytes(32)], session=session, flags=Flag.ONE_WAY)
    assert not served.server.arenas.staged()


def test_a_piece_that_is_no_message_ends_its_upload_which_is_answered_once(served: Served) -> None:
    client = served.connect(served.tcp)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    client.send(codec.encode(Op.UPLOAD, messages.Upload(64), request=1, session=session))
    header = {"request": 1, "session": session, "flags": Flag.ONE_WAY}
    client.send(codec.encode(Op.CHUNK, messages.Chunk(0), buffers=2, **header), [bytes(64)])
    with pytest.raises(ProtocolError, match="2 buffers announced, 1 came"):
        served.answer(client)
    assert not served.server.arenas.staged()
    client.send(codec.encode(Op.CHUNK, messages.Chunk(0), buffers=1, **header), [bytes(64)])
    client.send(codec.encode(Op.CHUNK, messages.Chunk(0), buffers=3, **header), [bytes(64)])
    assert served.ask(client, Op.PING, messages.Ping()) == messages.Pong("serving")


def test_an_upload_whose_session_is_closed_from_another_connection_is_answered(
    served: Served,
) -> None:
    client, other = served.connect(served.ipc), served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    client.send(codec.encode(Op.UPLOAD, messages.Upload(64), request=1, session=session))
    served.until(served.server.arenas.staged)
    served.ask(other, Op.CLOSE, messages.Close(), session=session)
    assert not served.server.arenas.staged()
    with pytest.raises(UnknownSession, match=f"session {session:016x} was closed"):
        served.answer(client)
    piece = codec.encode(
        Op.CHUNK, messages.Chunk(0), flags=Flag.ONE_WAY, request=1, session=session, buffers=1
    )
    client.send(piece, [bytes(64)])
    assert served.ask(client, Op.PING, messages.Ping()) == messages.Pong("serving")


def test_an_answer_that_is_too_long_for_a_message_is_refused_and_the_connection_stays(
    served: Served,
) -> None:
    client = served.connect(served.tcp)
    served.server.settings = dataclasses.replace(served.server.settings, frame_limit=KIB)
    for number in range(1, 100):
        served.server.registry.sessions[number] = Session(number, "tcp:9", "tiny", 0, None)
    with pytest.raises(RunError, match=r"an answer of .* KiB: at most 1\.0 KiB fit a message"):
        served.ask(client, Op.STATUS, messages.Status())
    served.server.registry.sessions.clear()
    assert served.ask(client, Op.STATUS, messages.Status()).sessions == ()


def test_each_connection_without_a_key_is_an_owner_of_its_own_for_ever(served: Served) -> None:
    owners = set()
    for _ in range(2):
        client = served.connect(served.tcp)
        client.socket.routing_id = b"chosen"
        client.socket.disconnect(served.tcp)
        client.socket.connect(served.tcp)
        served.ask(client, Op.HELLO, messages.Hello("", 0))
        (peer,) = served.server.registry.peers.values()
        owners.add(peer.owner)
        client.close()
        served.until(lambda: not served.server.registry.peers)
    assert len(owners) == 2


def test_all_that_a_dead_engine_has_said_is_heard(served: Served) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 5001))
    served.lease.close()
    deaths = deaths_of(served)
    served.until(lambda: deaths)
    assert len(served.server.registry.sessions[session].kept) == 5000


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("what", ["a record", "the ring"])
def test_an_engine_whose_link_makes_no_sense_is_ended_and_not_the_server(
    served: Served, what: str, gone: bool
) -> None:
    deaths = deaths_of(served)
    served.server._poll._spin_ns = 1_000_000  # it looks at lanes again and again
    if what == "a record":
        served.link.lane._out.put(0, b"nonsense")
    else:
        served.link.lane._out._words[HEAD] = 4
    served.link.lane.ring()
    if gone:
        served.lease.close()
    served.until(lambda: deaths)
    (reason,) = deaths
    assert "was ended, because its link made no sense: " in reason
    client = served.connect(served.ipc)
    assert served.ask(client, Op.PING, messages.Ping()) == messages.Pong("serving")


def test_an_engines_farewell_is_heard_though_it_was_still_to_be_told_something(
    served: Served,
) -> None:
    assert served.engine.lease is not None
    served.engine.lease.unsent.append((messages.Retire(1), []))
    served.lease.send(messages.Farewell("its device is of no use"))
    served.lease.close()
    deaths = deaths_of(served)
    served.until(lambda: deaths)
    assert "ended itself: its device is of no use" in deaths[0]


def test_a_session_that_ends_as_it_begins_is_told_of_in_that_order(served: Served) -> None:
    client = served.connect(served.tcp)
    client.send(codec.encode(Op.OPEN, messages.Open("tiny"), request=1))
    assert served.server._routers[b"t"].socket.poll(10_000)
    reply = served.server._reply

    def gone(envelope: bytes, frame: bytes, buffers: Any) -> None:
        reply(envelope, frame, buffers)
        served.server._on_gone(served.server.registry.peers[envelope])

    served.server.fleet._reply = gone
    served.until(lambda: served.server.journal.after(0, "tcp:1", 9))
    events = served.server.journal.after(0, "tcp:1", 9)
    assert [event.text.rpartition(" ")[2] for event in events] == ["begins", "ends"]
