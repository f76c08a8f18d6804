"""Peers that lie, flood or do not listen: a clean refusal each, and the others go on."""

import os
import resource
import socket
import time

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import djinn_zmq as djinn
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Frame, Slot, Tensor

FRANCE = "the capital of france is"
ANSWER_MS = 10_000
LOADED_MS = 60_000  # for an engine that has torch to import, beside others
LAST = messages.Wanted(None, (), "last", 0)


class Raw:
    """A peer that sends what it likes."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = ANSWER_MS
        self.socket.connect(endpoint)
        self.request = 0

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def ask(self, op, meta, session=0, buffers=(), **options):
        """Send a request and wait for its own reply."""
        self.request += 1
        frame = codec.encode(
            op, meta, request=self.request, session=session, buffers=len(buffers), **options
        )
        self.send(frame, *buffers)
        return self.reply()

    def reply(self):
        """The reply to the last request; what else comes is passed over."""
        while True:
            frame, *buffers = self.socket.recv_multipart()
            header = codec.peek(frame)
            if header.request == self.request and not header.flags & Flag.PROGRESS:
                return codec.decode(frame, buffers)

    def code(self, *args, **kwargs) -> str:
        return self.ask(*args, **kwargs).meta.code

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture(params=["ipc", "tcp"])
def raw(served, request):
    peer = Raw(served.endpoint if request.param == "ipc" else served.tcp)
    yield peer
    peer.close()


@pytest.fixture
def session(raw):
    raw.socket.rcvtimeo = LOADED_MS
    number = raw.ask(Op.OPEN, messages.Open("tiny")).meta.session
    raw.socket.rcvtimeo = ANSWER_MS
    return number


def answers(raw) -> bool:
    return raw.ask(Op.PING, messages.Ping()).meta.state == "serving"


def test_frames_that_are_no_message_are_refused_and_the_next_is_served(raw):
    good = codec.encode(Op.PING, messages.Ping(), request=2**50)
    for frames in (
        [b""],
        [b"x"],
        [b"DJ" + bytes(30)],
        [good[:-1] + b"\xff"],
        [b"XX" + good[2:]],
        [good[:2] + b"\x07" + good[3:]],
        [good[:3] + b"\xee" + good[4:]],
        [good, b"a buffer nobody announced"],
        [good] * 200,
        [os.urandom(1000)] * 3,
    ):
        raw.send(*frames)
        assert answers(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_random_frames_never_stop_the_server(served, frames):
    raw = _shared_raw(served)
    raw.send(*frames)
    assert answers(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    op=st.sampled_from(list(Op)),
    flags=st.integers(0, 63),
    junk=st.binary(max_size=64),
    buffers=st.lists(st.binary(max_size=64), max_size=3),
)
def test_valid_headers_with_junk_behind_them_never_stop_the_server(
    served, op, flags, junk, buffers
):
    raw = _shared_raw(served)
    header = codec.HEADER.pack(codec.MAGIC, codec.VERSION, op, flags, len(buffers), 2**60, 1, 0, 0)
    raw.send(header + junk, *buffers)
    assert answers(raw)


_raws: dict[str, Raw] = {}


def _shared_raw(served) -> Raw:
    """One peer for all examples of a property test."""
    if served.endpoint not in _raws:
        _raws[served.endpoint] = Raw(served.endpoint)
    return _raws[served.endpoint]


@pytest.fixture(scope="module", autouse=True)
def _close_shared_raws():
    yield
    while _raws:
        _raws.popitem()[1].close()


def test_tensors_that_lie_are_refused_by_the_engine_and_nothing_is_lost(raw, session):
    def ids(shape, where, dtype="int64"):
        return messages.Run((), Tensor(dtype, shape, where), LAST)

    for meta, buffers in (
        (ids((1, 3), Frame(0)), [bytes(23)]),
        (ids((1, 3), Frame(1)), [bytes(24)]),
        (ids((1 << 40,), Frame(0)), [bytes(8)]),
        (ids((-1, -3), Frame(0)), [bytes(24)]),
        (ids((1,) * 9, Frame(0)), [bytes(8)]),
        (ids((1, 3), Frame(0), "complex128"), [bytes(24)]),
        (ids((1, 3), Frame(0), "float32"), [bytes(12)]),
        (ids((1, 3), Slot(1, 1 << 40, 0)), []),
        (ids((1, 3), Slot(1, 0, 12345)), []),
        (ids((1, 3), Slot(999, 0, 0)), []),
    ):
        reply = raw.ask(Op.RUN, meta, session, buffers)
        assert reply.header.flags & Flag.ERROR, meta
        assert reply.meta.code in ("protocol", "lost", "stale-slot", "access"), reply.meta
    fine = messages.Run((FRANCE,), None, LAST)
    assert raw.ask(Op.RUN, fine, session).meta.state == "finished"


def test_the_engines_own_messages_are_not_a_clients_to_send(raw, session):
    for op, meta in (
        (Op.LEAVE, messages.Leave()),
        (Op.DROP, messages.Drop((1,))),
        (Op.ENTER, messages.Enter("uid:0", "tiny")),
        (Op.LOAD, messages.Load("x", "/", "auto")),
    ):
        assert raw.code(op, meta, session) == "protocol"
    assert answers(raw)


def test_a_request_asked_twice_runs_once_and_is_answered_twice_alike(raw, session):
    meta = messages.Run((FRANCE,), None, messages.Wanted(2, (), "last", 0))
    first = raw.ask(Op.RUN, meta, session)
    raw.request -= 1
    second = raw.ask(Op.RUN, meta, session)
    assert second.meta.run == first.meta.run
    assert second.meta.checkpoints == first.meta.checkpoints


def test_what_is_asked_twice_at_once_or_wants_no_answer_is_not_waited_for_ever(
    raw, session, server
):
    meta = messages.Run((FRANCE,), None, messages.Wanted(None, (), "top", 1))
    for _ in range(20):
        raw.request += 1
        for _ in range(2):
            raw.send(codec.encode(Op.RUN, meta, request=raw.request, session=session))
    raw.reply()
    for _ in range(20):
        raw.request += 1
        options = {"flags": Flag.ONE_WAY, "request": raw.request, "session": session}
        raw.send(codec.encode(Op.RUN, meta, **options))
    assert raw.ask(Op.RUN, meta, session).meta.state == "finished"
    (found,) = (one for one in server.status().sessions if one.id == session)
    assert found.waiting == 0


def test_what_is_asked_again_over_another_connection_is_owed_once(served, server):
    one, other = Raw(served.endpoint), Raw(served.endpoint)  # of one user: the session moves
    session = one.ask(Op.OPEN, messages.Open("tiny")).meta.session
    meta = messages.Run(("the " * 200,) * 48, None, messages.Wanted(None, (), "top", 1))
    one.send(codec.encode(Op.RUN, meta, request=77, session=session))
    assert one.ask(Op.PING, messages.Ping(), session).meta.state == "running"
    other.request = 76
    assert other.ask(Op.RUN, meta, session).meta.state == "finished"
    (found,) = (known for known in server.status().sessions if known.id == session)
    assert found.waiting == 0
    one.close()
    other.close()


def test_uploads_that_lie_are_refused_once_and_their_slots_come_back(raw, session, served):
    def used():
        return served.status().memory.used

    before = used()  # of peers before this one, too, whose end may not have been noticed yet
    assert raw.code(Op.UPLOAD, messages.Upload(0), session) == "bad-request"
    assert raw.code(Op.UPLOAD, messages.Upload(1 << 50), session) == "bad-request"
    raw.request += 1
    upload = codec.encode(Op.UPLOAD, messages.Upload(100_000), request=raw.request, session=session)
    chunk = codec.encode(
        Op.CHUNK,
        messages.Chunk(50_000),
        flags=Flag.ONE_WAY,
        request=raw.request,
        session=session,
        buffers=1,
    )
    raw.send(upload)
    raw.send(chunk, bytes(60_000))
    assert answers(raw)
    assert used() <= before


def test_a_frame_over_the_limit_ends_its_connection_and_no_other(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        flooding = Raw(served.tcp)
        flooding.send(codec.encode(Op.PING, messages.Ping(), request=1), bytes(4 << 20))
        assert tiny.run(FRANCE).top(1)[0].token == "paris"
        flooding.close()


def test_a_peer_that_never_reads_is_dropped_and_the_others_are_served(served):
    deaf = Raw(served.tcp)
    deaf.socket.rcvhwm = 1
    deaf.socket.setsockopt(zmq.RCVBUF, 4096)
    ask = codec.encode(Op.STATUS, messages.Status(), request=1)
    with served.connect() as server:
        tiny = server.model("tiny")
        limit = time.monotonic() + 30
        while "does not read its answers" not in served.words():
            assert time.monotonic() < limit
            for _ in range(2000):
                try:
                    deaf.socket.send(ask, zmq.DONTWAIT)
                except zmq.Again:
                    break
            assert tiny.run(FRANCE).top(1)[0].token == "paris"
    deaf.close()


def test_server_and_engine_may_have_as_many_descriptors_as_the_system_allows(served):
    engine = served.engine_pid()
    for pid in (served.process.pid, engine):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert soft == (1 << 20 if hard == resource.RLIM_INFINITY else hard)


def test_the_lease_socket_refuses_strangers_and_nonsense(served):
    path = f"{served.path}.lease"
    for packet in (
        b"nonsense",
        codec.encode_lease(messages.Join(b"guess")),
        codec.encode_lease(messages.Want(1)),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            sock.connect(path)
            sock.send(packet)
            assert sock.recv(4096) == b""
    with served.connect() as server:
        assert server.ping() == "serving"


def test_memory_that_is_not_sealed_or_no_arena_is_refused_on_the_lease_socket(served):
    with served.connect() as server:
        lease = server.connection.sharing.lease
        loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
        os.ftruncate(loose, 1 << 20)
        with pytest.raises(djinn.DjinnError, match="must be sealed"):
            lease.ask(messages.Share(), loose)
        with pytest.raises(djinn.DjinnError, match="arena 4242 is gone"):
            lease.ask(messages.Want(4242))
        os.close(loose)
        assert server.model("tiny").run(FRANCE).top(1)[0].token == "paris"


def test_a_release_that_wants_no_answer_frees_what_there_is_and_passes_over_the_rest(raw, session):
    meta = messages.Run((FRANCE,), None, messages.Wanted(2, (), "last", 0))
    point = raw.ask(Op.RUN, meta, session).meta.checkpoints[0]
    assert raw.code(Op.RELEASE, messages.Release((4711, point.id)), session) == (
        "unknown-checkpoint"
    )
    one_way = {"flags": Flag.ONE_WAY, "request": 2**50, "session": session}
    raw.send(codec.encode(Op.RELEASE, messages.Release((4711, point.id)), **one_way))
    assert raw.code(Op.RELEASE, messages.Release((point.id,)), session) == "unknown-checkpoint"
