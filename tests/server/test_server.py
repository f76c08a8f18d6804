"""The server's loop turned by hand, and its clients."""

import dataclasses
from typing import Any

import pytest
import zmq

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.errors import Busy, Lost, ProtocolError, RunError, UnknownSession
from djinn_zmq.memory.arena import OwnArena
from djinn_zmq.server.registry import Session
from djinn_zmq.settings import KIB
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Events
from tests.server.serving import Served, joined, keep, last_word, no_descriptors_left, told


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


def test_of_a_connection_without_a_key_that_has_heard_of_events_nothing_is_left(
    served: Served,
) -> None:
    news, asked = served.server.news, Events(0)
    client, stays = served.connect(served.tcp), served.connect(served.ipc)
    scope = served.ask(client, Op.EVENTS, asked).scope
    served.ask(stays, Op.EVENTS, asked)
    for one in (client, stays):
        served.ask(one, Op.OPEN, messages.Open("tiny"))
    assert {topic[0] for topic in news._last} > {scope} and len(news._scopes._tokens) == 2
    client.close()
    served.until(lambda: len(served.server.registry.peers) == 1)
    assert len(news._scopes._tokens) == 1 and not news._scopes.known(scope.encode())
    assert scope not in {topic[0] for topic in news._last} and news._last


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


def test_more_that_is_asked_for_as_if_it_were_answered_is_refused_and_not_passed_on(
    served: Served,
) -> None:
    client = served.connect(served.tcp)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    with pytest.raises(ProtocolError, match="MORE is not answered: it is sent one way"):
        served.ask(client, Op.MORE, messages.More(7), session=session, credit=3)
    more = codec.encode(
        Op.MORE, messages.More(7), flags=Flag.ONE_WAY, request=2, session=session, credit=4
    )
    client.send(more)
    served.ask(client, Op.PING, messages.Ping())  # behind it
    said = [codec.peek(frame) for _, frame, _ in iter(served.link.receive, None)]
    assert [one.credit for one in said if one.op == Op.MORE] == [4]


def test_a_session_with_as_many_requests_as_may_wait_can_cancel_each_of_them(
    served: Served,
) -> None:
    client = served.connect(served.tcp)
    served.server.settings = dataclasses.replace(served.server.settings, queue_limit=2)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    metas = ((Op.PING, messages.Ping()),) * 2 + ((Op.CANCEL, messages.Cancel(10)),) * 2
    for request, (op, meta) in enumerate(metas, start=10):
        client.send(codec.encode(op, meta, request=request, session=session))
    for op, meta in (metas[0], metas[-1]):
        with pytest.raises(Busy, match="4 requests of this session wait"):
            served.ask(client, op, meta, session=session)
    assert [request for _, request in served.engine.owed] == [10, 11, 12, 13]


def test_the_answer_to_a_ping_is_stayed_awake_for_where_its_engine_has_nothing_else_to_do(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.engine.link is not None
    stayed: list[object] = []
    monkeypatch.setattr(served.server._poll, "expect", stayed.append)
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    client.send(codec.encode(Op.TOKENS, messages.Tokens("text", None), request=1, session=session))
    client.send(codec.encode(Op.PING, messages.Ping(), request=2, session=session))
    served.until(lambda: len(served.engine.owed) == 2)
    assert not stayed
    served.engine.owed.clear()
    client.send(codec.encode(Op.PING, messages.Ping(), request=3, session=session))
    served.until(lambda: served.engine.owed)
    assert stayed == [served.engine.link.lane]


def test_what_a_client_with_a_lane_knows_before_the_server_is_written_before_the_end_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    asked: list[tuple[int, Any]] = []
    monkeypatch.setattr(served.engine, "tell", lambda op, meta: asked.append((op, meta.ids)))
    keep(served, session, range(1, 3))  # said, and not rung for yet
    served.server.stop()
    served.server.stop()  # for whose answer it is not waited
    served.server._shelve()
    assert asked == [(Op.SHELVE, (1, 2))]
