"""Clients that lie over a lane: refused or dropped, and the others go on."""

import os

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import errors
from djinn_zmq.bus.lane import CAPACITY, create
from djinn_zmq.memory.ring import HEAD, TAIL
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import inline
from tests.end_to_end.conftest import until
from tests.end_to_end.test_lane import lanes_of

FRANCE = "the capital of france is"


def raw_frame(op: Op, meta, session: int, request: int, flags: int = 0) -> bytes:
    return codec.encode(op, meta, flags=flags, session=session, request=request)


@pytest.fixture
def own(served):
    """A client, its lane, and what asks over it with bytes of the test's choice."""
    with served.connect() as server:
        tiny = server.model("tiny")
        tiny.ping()
        (lane,) = lanes_of(server)

        def ask(frame: bytes) -> codec.Message:
            lane.send(b"", frame)
            answer = None
            while answer is None:
                answer = server.connection.lanes.hear(lane, 10.0)
            return codec.decode(*answer[1:])

        yield server, tiny, lane, ask


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "protocol"),
        (b"nonsense", "protocol"),
        (b"DJ" + bytes(30), "protocol"),
        (bytes(300 * 1024), "protocol"),
        (raw_frame(Op.PING, messages.Ping(), 4711, 1), "unknown-session"),
        (raw_frame(Op.PING, messages.Ping(), 4711, 1, Flag.REPLY), "protocol"),
    ],
)
def test_what_is_no_request_is_refused_and_the_next_one_served(own, frame, code):
    _, tiny, _, ask = own
    answer = ask(frame)
    assert answer.header.flags & Flag.ERROR and answer.meta.code == code
    assert tiny.ping() == "idle"


@pytest.mark.parametrize("op", [Op.STOP, Op.LOAD, Op.LEAVE, Op.ENTER, Op.ADOPT, Op.DROP])
def test_the_servers_own_words_are_not_a_clients_to_say(own, op):
    _, tiny, _, ask = own
    meta = {
        Op.STOP: messages.Stop(),
        Op.LOAD: messages.Load("tiny", "/", "auto"),
        Op.LEAVE: messages.Leave(),
        Op.ENTER: messages.Enter("uid:0", "tiny"),
        Op.ADOPT: messages.Adopt(inline(np.zeros((1, 1), np.int64)), ()),
        Op.DROP: messages.Drop((1,)),
    }[op]
    answer = ask(raw_frame(op, meta, tiny.session_id, 2**40))
    assert answer.meta.code == "protocol"
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_what_wants_no_answer_and_is_no_op_ends_no_engine(own):
    server, tiny, lane, _ = own
    engine = server.status().engines[0].pid
    frame = bytearray(raw_frame(Op.RELEASE, messages.Release(()), tiny.session_id, 1, Flag.ONE_WAY))
    frame[codec.OP] = b"\xc8"
    lane.send(b"", bytes(frame))
    assert tiny.ping() == "idle"
    assert server.status().engines[0].pid == engine


def test_another_owners_session_is_not_to_be_reached_over_a_lane(own, served):
    _, tiny, _, ask = own
    with djinn.connect(served.tcp) as stranger:  # over tcp without a key each is its own owner
        theirs = stranger.model("tiny")
        point = theirs.run(FRANCE, stop_at=2).checkpoint
        answer = ask(raw_frame(Op.PING, messages.Ping(), theirs.session_id, 2**41))
        assert answer.meta.code == "unknown-session"
        answer = ask(
            raw_frame(Op.RELEASE, messages.Release((point.id,)), tiny.session_id, 2**41 + 1)
        )
        assert answer.meta.code == "unknown-checkpoint"
        assert point.resume().top(1)[0].token == "paris"


@pytest.mark.parametrize(
    "lie",
    [
        lambda lane: lane._out._words.__setitem__(HEAD, 2**62),  # claims to have written
        lambda lane: lane._out.put(2**32 - 1, b"what"),
        lambda lane: lane._out.put(0, b"\x93\xc4\0\xc4\x4dwhat"),
        lambda lane: (
            lane._in._words.__setitem__(TAIL, 2**62),
            # Refused, each in more than 64 bytes: what is said to be read is looked at once a ringful.
            [lane.send(b"", b"?") for _ in range(CAPACITY // 64)],
        ),  # to have read
    ],
)
def test_a_client_whose_ring_lies_is_dropped_and_the_others_go_on(served, lie):
    with served.connect() as honest:
        theirs = honest.model("tiny")
        theirs.ping()
        with served.connect() as server:
            tiny = server.model("tiny")
            tiny.ping()
            (lane,) = lanes_of(server)
            lie(lane)
            lane.ring()
            until(server.connection.lanes.disturbed, "the liar is told")
            with pytest.raises(errors.Lost):
                tiny.ping()
        assert theirs.run(FRANCE).top(1)[0].token == "paris"
        until(lambda: len(honest.sessions()) == 1, "the liar's session is closed")


def test_a_lane_is_offered_with_its_three_descriptors_and_for_ones_own_session(served):
    with served.connect() as server, djinn.connect(served.tcp) as stranger:
        tiny, theirs = server.model("tiny"), stranger.model("tiny")
        lease = server.connection.sharing.lease
        ends = create(CAPACITY)
        with pytest.raises(errors.ProtocolError, match="2 descriptors beside a Offer"):
            lease.ask(messages.Offer(tiny.session_id), *ends[:2])
        with pytest.raises(errors.UnknownSession):
            lease.ask(messages.Offer(theirs.session_id), *ends)
        for _ in range(8):
            lease.ask(messages.Offer(tiny.session_id), *ends)
        with pytest.raises(errors.Busy, match="8 lanes are open"):
            lease.ask(messages.Offer(tiny.session_id), *ends)
        ends.close()
        assert stranger.model("tiny").run(FRANCE).top(1)[0].token == "paris"


def test_what_is_offered_as_a_lane_and_is_none_costs_its_client_the_connection(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        lease = server.connection.sharing.lease
        plain = [os.memfd_create("none") for _ in range(3)]
        lease.ask(messages.Offer(tiny.session_id), *plain)
        for fd in plain:
            os.close(fd)
        with pytest.raises((errors.Lost, errors.UnknownSession)):
            while True:
                tiny.ping()
    with served.connect() as server:
        assert server.model("tiny").ping() == "idle"
