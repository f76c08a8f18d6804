"""What an engine's loop does beside requests."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.bus.lane import CAPACITY, Lane
from djinn_zmq.bus.lease import LeaseSocket, close_all, pair
from djinn_zmq.bus.link import Link
from djinn_zmq.bus.poll import MANY
from djinn_zmq.engine.device.devices import Broken, Cpu
from djinn_zmq.engine.loop import EngineLoop, connect
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import Lost, ProtocolError
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import (
    Adopt,
    Cancel,
    Drop,
    Enter,
    Granted,
    Kept,
    Listen,
    More,
    Ping,
    Pong,
    Release,
    Resume,
    Share,
    Want,
    Wanted,
)
from djinn_zmq.wire.messages import Broken as LaneBroken
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Device, Tensor, inline
from djinn_zmq.wire.tiers import Shelve, Shelved
from tests.bus.conftest import wait

SETTINGS = Settings()
WAIT_S = 10.0


class Dying(Cpu):
    def broken(self, error: BaseException) -> str:
        return "its CUDA context is poisoned" if "CUDA" in str(error) else ""


@pytest.mark.parametrize(("text", "ends_as"), [("CUDA error", Broken), ("a mistake", RuntimeError)])
def test_a_device_found_broken_by_a_copy_that_nobody_waits_for_is_said_to_be(
    text: str, ends_as: type[Exception]
) -> None:
    def fill() -> None:
        raise RuntimeError(text)

    nothing: Any = None
    loop: Any = SimpleNamespace(
        _keeping=SimpleNamespace(tiers=SimpleNamespace(fill=fill)),
        _work=Work(nothing, nothing, nothing, nothing, nothing, nothing, Dying()),
    )
    with pytest.raises(ends_as):
        EngineLoop._fill(loop)


def test_who_says_again_that_it_is_expected_while_it_is_brought_up_brings_no_more_chores() -> None:
    chores: list[Iterator[None]] = []
    brought: list[int] = []
    expected: list[int] = []

    def back(session: int) -> Iterator[None]:
        yield
        brought.append(session)

    loop: Any = SimpleNamespace(
        _keeping=SimpleNamespace(
            tiers=SimpleNamespace(back=back),
            vault=SimpleNamespace(back=back),
            room=SimpleNamespace(expect=expected.append),
        ),
        _work=SimpleNamespace(chores=chores),
        _answers=SimpleNamespace(answer=lambda *_: None),
    )
    session: Any = SimpleNamespace(id=5, coming=0)
    message: Any = SimpleNamespace(meta=SimpleNamespace(expected_s=0), header=None)
    for times in (1, 2):
        for _ in range(3):
            EngineLoop._away(loop, b"", message, session, 0)
        assert len(chores) == 2
        while chores:
            assert list(chores.pop()) == [None]
        assert brought == [5] * 2 * times and expected == [5] * 3 * times


@pytest.mark.parametrize(
    ("stays", "order"),
    [
        (lambda: True, ["begun", (5, 6)]),
        (lambda: False, ["begun", (5, 6), "a job"]),
        (lambda: 1 / 0, ["begun", (5, 6)]),
    ],
)
def test_what_a_resume_lets_go_of_goes_behind_the_copy_it_waits_for_and_ahead_of_a_job(
    stays: Callable[[], bool], order: list[Any]
) -> None:
    done: list[Any] = []

    def begin(*_: object) -> bool:
        done.append("begun")
        return stays()

    loop: Any = SimpleNamespace(
        _debugging=SimpleNamespace(tells=False),
        _answers=SimpleNamespace(again=lambda *_: False),
        _model_of=lambda session: None,
        _stays=SimpleNamespace(begin=begin),
        _let_go=lambda session, numbers: done.append(numbers),
        _run=lambda *_: done.append("a job"),
    )
    asked = Resume(1, None, (), Wanted(2, (), "none", 0), (5, 6))
    message: Any = SimpleNamespace(meta=asked, buffers=(), header=None)
    with contextlib.suppress(ZeroDivisionError):
        EngineLoop._resume(loop, b"", message, SimpleNamespace(), 0)  # type: ignore[arg-type]
    assert done == order


@contextlib.contextmanager
def engine_that(asks: Callable[[EngineLoop], Iterator[None]]) -> Iterator[tuple[Link, LeaseSocket]]:
    """An engine that works on the chore *asks* when it has session 5; the server's ends."""
    link, link_ends = Link.create(SETTINGS)
    server, theirs = pair()
    server.socket.settimeout(WAIT_S)

    def engine() -> None:
        loop = EngineLoop(*connect(link_ends, theirs.detach(), SETTINGS), Cpu(), SETTINGS, 0)
        loop._work.chores.append(asks(loop))
        with contextlib.suppress(Lost):
            loop.serve()
        loop.close()

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        take_share(server)
        link.send(b"", codec.encode(Op.ENTER, Enter("a user", "tiny", 0), session=5))
        server.send(Granted(1))
        yield link, server
    finally:
        server.close()
        thread.join(WAIT_S)
        link.close()


def take_share(server: LeaseSocket) -> None:
    packet, fds = server.receive()
    assert isinstance(packet, Share)
    close_all(fds)


def answer_to_a_ping(lane: Lane, envelope: bytes, session: int = 5) -> Any:
    """What comes back over *lane*, of all that comes, under *envelope*; None: nothing in time."""
    lane.send(envelope, codec.encode(Op.PING, Ping(), request=9, session=session))
    read, write = os.pipe()
    limit = time.monotonic() + WAIT_S
    found = None
    while found is None and time.monotonic() < limit:
        wait(lane, read, WAIT_S)
        while (message := lane.receive()) is not None:
            if message[0] == envelope and (answer := codec.decode(message[1])).header.request == 9:
                found = answer.meta
    os.close(read)
    os.close(write)
    return found


def test_a_lane_that_is_introduced_while_the_engine_asks_for_something_is_listened_to() -> None:
    def asks(loop: EngineLoop) -> Iterator[None]:
        loop._lease.ask(Want(7))
        yield from ()

    lane, lane_ends = Lane.create(CAPACITY, SETTINGS)
    with engine_that(asks) as (_, server):
        packet, _ = server.receive()
        assert packet == Want(7)
        server.send(Listen(3, "a user"), *lane_ends)  # crosses the answer
        lane_ends.close()
        server.send(Granted(7))  # and nothing else wakes the engine
        assert answer_to_a_ping(lane, b"").state == "idle"
    lane.close()


def test_news_that_a_question_took_are_not_waited_for_where_the_socket_spoke_of_them() -> None:
    """An arena is made, which is to be shared, and news come: both speak in one turn."""
    made, told = threading.Event(), threading.Event()

    def asks(loop: EngineLoop) -> Iterator[None]:
        growing = loop._keeping.room.growing
        assert growing.begin(1, "another zone")
        loop._keeping.arenas._grower.submit(int).result()  # behind what makes it, and tells of it
        made.set()
        assert told.wait(WAIT_S)
        yield from ()

    with engine_that(asks) as (link, server):
        assert made.wait(WAIT_S)
        server.send(LaneBroken(3, "its client is gone"))
        told.set()
        take_share(server)
        server.send(Granted(2))
        assert answer_to_a_ping(link.lane, b"i").state == "idle"


def test_a_no_op_says_how_long_the_engine_had_it() -> None:
    def asks(loop: EngineLoop) -> Iterator[None]:
        yield from ()

    with engine_that(asks) as (link, _):
        begin_ns = time.perf_counter_ns()
        pong = answer_to_a_ping(link.lane, b"i")
        assert 0 < pong.inside_ns < time.perf_counter_ns() - begin_ns


def answer_of(link: Link, op: Op) -> codec.Message:
    """The first message of *op* that the engine sends its server."""
    read, write = os.pipe()
    limit = time.monotonic() + WAIT_S
    found = None
    while found is None and time.monotonic() < limit:
        wait(link.lane, read, WAIT_S)
        while found is None and (message := link.receive()) is not None:
            if codec.peek(message[1]).op == op:
                found = codec.decode(*message[1:])
    os.close(read)
    os.close(write)
    assert found is not None
    return found


def test_an_engine_that_is_told_that_the_server_stops_takes_requests_no_more() -> None:
    """Not those either that come over a lane, of which the server knows nothing."""

    def asks(loop: EngineLoop) -> Iterator[None]:
        yield from ()

    with engine_that(asks) as (link, _):
        link.send(b"", codec.encode(Op.SHELVE, Shelve((), 1.0)))
        assert answer_of(link, Op.SHELVE).meta == Shelved(())
        link.send(b"i", codec.encode(Op.PING, Ping(), request=9, session=5))
        assert "the server stops" in str(codec.error_of(answer_of(link, Op.PING)))


def test_what_cannot_be_adopted_is_told_to_the_server_as_gone_and_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def asks(loop: EngineLoop) -> Iterator[None]:
        yield from ()

    ids = inline(np.ones((1, 2), np.int64))
    kept = Kept(77, 5, 7, 2, Tensor("float32", (1, 2, 4), Device(0, 0, 1)))
    with engine_that(asks) as (link, _):
        link.send(b"", codec.encode(Op.ADOPT, Adopt(ids, (kept,)), session=5))
        said = answer_of(link, Op.DROP)
        assert (said.meta.ids, said.header.session) == ((77,), 5)
    assert (
        "of session 0000000000000005 is lost, for no copy outlived its engine: 0x4d" in caplog.text
    )


def test_what_is_dropped_of_a_conversation_is_its_sessions_no_more() -> None:
    left: dict[int, object] = {7: object(), 8: object()}
    there = threading.Event()

    def asks(loop: EngineLoop) -> Iterator[None]:
        while 5 not in loop._sessions:
            yield
        loop._sessions[5].branches = left
        there.set()

    with engine_that(asks) as (link, _):
        assert there.wait(WAIT_S)
        link.send(b"", codec.encode(Op.DROP, Drop((7,)), session=5))
        assert answer_to_a_ping(link.lane, b"i")
        assert list(left) == [8]


def test_what_the_server_has_said_is_heard_before_a_lane_however_much_it_is() -> None:
    told = threading.Event()

    def asks(loop: EngineLoop) -> Iterator[None]:
        assert told.wait(WAIT_S)
        yield from ()

    lane, lane_ends = Lane.create(CAPACITY, SETTINGS)
    with engine_that(asks) as (link, server):
        server.send(Listen(3, "a user"), *lane_ends)
        lane_ends.close()
        for session in range(6, 6 + 5 * MANY):
            link.send(b"", codec.encode(Op.ENTER, Enter("a user", "tiny", 0), session=session))
        told.set()
        assert isinstance(answer_to_a_ping(lane, b"", session), Pong)
    lane.close()


def test_what_comes_over_a_lane_does_not_end_what_the_server_hands_over() -> None:
    finished: list[bool] = []

    def asks(loop: EngineLoop) -> Iterator[None]:
        loop._keeping.finish_adopting = lambda: finished.append(True)  # type: ignore[method-assign]
        yield from ()

    lane, lane_ends = Lane.create(CAPACITY, SETTINGS)
    ids = inline(np.ones((1, 2), np.int64))
    kept = Kept(77, 5, 7, 2, Tensor("float32", (1, 2, 4), Device(0, 0, 1)))
    with engine_that(asks) as (link, server):
        server.send(Listen(3, "a user"), *lane_ends)
        lane_ends.close()
        link.send(b"", codec.encode(Op.ADOPT, Adopt(ids, (kept,)), session=5))
        answer_of(link, Op.DROP)
        assert isinstance(answer_to_a_ping(lane, b""), Pong) and not finished
        assert isinstance(answer_to_a_ping(link.lane, b"i"), Pong) and finished
    lane.close()


def test_more_that_is_asked_for_on_a_lane_as_if_it_were_answered_is_refused() -> None:
    nothing: Any = None
    more = codec.decode(codec.encode(Op.MORE, More(7), request=2, session=5, credit=3), ())
    with pytest.raises(ProtocolError, match="MORE is not answered: it is sent one way"):
        EngineLoop._more(nothing, b"", more, nothing, 0)


def test_on_a_lane_a_session_with_as_many_requests_as_may_wait_can_end_what_it_has() -> None:
    refused: list[int] = []
    taken: list[int] = []
    loop: Any = SimpleNamespace(
        _link=SimpleNamespace(lane=SimpleNamespace(unfinished=lambda: False)),
        _settings=replace(SETTINGS, queue_limit=1),
        _sessions={5: SimpleNamespace(owner="me")},
        _turns=SimpleNamespace(of=lambda session: ["a run"]),
        _answers=SimpleNamespace(refuse=lambda _, header, error: refused.append(header.op)),
        _take=lambda envelope, header, *_: taken.append(header.op),
    )
    for op, meta in ((Op.PING, Ping()), (Op.CANCEL, Cancel(1)), (Op.RELEASE, Release((1,)))):
        frame = codec.encode(op, meta, request=2, session=5)
        EngineLoop._take_on_lane(loop, b"", "me", frame, (), 0)
    assert (refused, taken) == ([Op.PING], [Op.CANCEL, Op.RELEASE])
