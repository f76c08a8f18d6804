"""What an engine says, and when it wakes whom for it."""

import select
from collections.abc import Iterator

import pytest

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.link import Link
from djinn_zmq.bus.poll import Poll
from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.lanes import Lanes
from djinn_zmq.settings import Settings

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
