"""What an engine says, and when it wakes whom for it."""

import select
from collections.abc import Iterator

import pytest

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.link import Link
from djinn_zmq.bus.poll import Poll
from djinn_zmq.engine.answers import STORED_LIMIT, STORED_NBYTES, Answers
from djinn_zmq.engine.lanes import Lanes
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Done
from djinn_zmq.wire.ops import Op

SETTINGS = Settings()
ROUTE = b"t a client's route"


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    """The server's end and the engine's."""
    server, ends = Link.create(SETTINGS)
    engine = Link(Lane(ends, SETTINGS, first=False))
    yield server, engine
    engine.close()
    server.close()


def rings_of(server: Link) -> bool:
    """Has the server's bell rung since the last look?"""
    ready, _, _ = select.select([server.lane], [], [], 0)
    server.lane.hush()
    return bool(ready)


def answers_on(engine: Link, *, rings_server: bool) -> Answers:
    lanes = Lanes(Poll(), SETTINGS, lambda *_: None, lambda *_: None)
    return Answers(engine, lanes, rings_server=rings_server)


def test_the_server_is_rung_ahead_of_an_answer_where_nothing_is_to_be_done_before_it(links) -> None:
    server, engine = links
    answers = answers_on(engine, rings_server=True)
    answers.soon(ROUTE)
    assert rings_of(server)
    server.send(ROUTE, b"another request")
    answers.soon(ROUTE)
    assert not rings_of(server)


def test_a_server_that_does_not_stay_awake_for_it_is_not_rung_ahead(links) -> None:
    server, engine = links
    answers_on(engine, rings_server=False).soon(ROUTE)
    assert not rings_of(server)


def test_a_rehearsal_says_nothing_to_anybody(links) -> None:
    server, engine = links
    answers_on(engine, rings_server=True).rehearse()
    assert not rings_of(server)
    assert server.receive() is None


def asked(request: int, session: int = 1) -> Header:
    return codec.peek(codec.encode(Op.RELEASE, Done(), request=request, session=session))


def test_the_last_answers_of_each_session_are_sent_again_to_who_asks_again_unless_they_are_large(
    links,
) -> None:
    server, engine = links
    answers = answers_on(engine, rings_server=False)
    for request in range(STORED_LIMIT + 1):
        answers.answer(ROUTE, asked(request), Done(), store=True)
    answers.answer(ROUTE, asked(0, session=2), Done(), store=True)
    answers.answer(ROUTE, asked(1, session=2), Done())
    answers.answer(ROUTE, asked(2, session=2), Done(), [bytes(STORED_NBYTES)], store=True)
    while server.receive():
        pass
    kept = [
        number for number in range(STORED_LIMIT + 1) if answers.again(b"t again", asked(number))
    ]
    assert kept == list(range(1, STORED_LIMIT + 1))  # the first has made room for the last
    for number in kept:
        route, frame, _ = server.receive()
        assert (route, codec.peek(frame).request) == (b"t again", number)
    assert [answers.again(ROUTE, asked(number, session=2)) for number in range(3)] == [
        True,
        False,
        False,
    ]
    answers.forget(1)
    assert not answers.again(ROUTE, asked(1)) and answers.again(ROUTE, asked(0, session=2))
