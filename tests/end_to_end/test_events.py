"""Events as they come, to those who may know of them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

import djinn_zmq as djinn
from djinn_zmq import aio, errors
from djinn_zmq.bus.news import Subscriber
from djinn_zmq.client.calls import Call
from djinn_zmq.settings import Settings
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Events as Asked

FRANCE = "the capital of france is"
WAIT_S = 20.0


@pytest.fixture
def listener(served):
    """Another client of the same owner's."""
    with served.connect() as one:
        yield one


def last_of(server) -> int:
    return max((event.number for event in server.events().so_far()), default=0)


def where(server):
    """Where events are published, and under what scope for this client."""

    def asked():
        reply = yield Call(Op.EVENTS, Asked(2**62))
        return reply.meta

    return server.drive(asked())


def test_what_happens_is_told_as_it_happens(served, listener):
    with served.connect(lane=False) as server:  # behind the server's word to its engine
        what_happens_is_told(listener, server)


def what_happens_is_told(listener, server):
    events = listener.events(last_of(listener), kinds=["session", "run", "stop", "resume"])
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(next, events)
        tiny = server.model("tiny")
        begins = first.result(WAIT_S)
        assert (begins.kind, begins.session) == ("session", tiny.session_id)
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        point.resume()
        told = [thread.submit(next, events).result(WAIT_S) for _ in range(4)]
    assert [event.kind for event in told] == ["run", "stop", "resume", "run"]
    assert "5 tokens" in told[0].text and "after layer 2" in told[1].text
    assert {event.session for event in told} == {tiny.session_id} and told[1].elapsed_ns > 0
    assert [event.number for event in told] == sorted(event.number for event in told)


def test_a_debuggers_stops_are_told_whoever_listens(served, listener, server):
    with served.connect() as theirs, ThreadPoolExecutor(1) as thread:
        model, last = theirs.model("tiny"), last_of(listener)
        with server.attach(model, stop_at=2) as attached:
            answer = thread.submit(model.run, FRANCE)
            attached.wait(WAIT_S).continue_()
            answer.result(WAIT_S)
    known = [event for event in listener.events(last).so_far() if event.session == model.session_id]
    assert [event.kind for event in known if event.kind in ("stop", "resume")] == ["stop", "resume"]


def test_what_a_slow_listener_has_missed_comes_from_the_journal(listener, server):
    events = listener.events(last_of(listener), kinds=["session"])
    server.model("tiny").close()
    assert next(events).text.endswith("begins")
    subscriber = events._subscriber
    lost = []
    while len(lost) < 3:  # as if the queue had been full
        server.model("tiny").close()
        subscriber.wait(WAIT_S)
        lost += subscriber.take()
    server.model("tiny").close()
    numbers = [next(events).number for _ in range(len(lost) + 1)]
    assert numbers == sorted(set(numbers))
    assert (
        numbers
        == [e.number for e in listener.events(numbers[0] - 1).so_far() if e.kind == "session"][
            : len(numbers)
        ]
    )


def test_nobody_hears_what_is_not_his(served, listener, server):
    asked = where(listener)
    stranger = Subscriber(asked.endpoint, Settings(), None, ["all/", "", f"{'0' * 32}/"])
    try:
        while not stranger.holds:
            assert stranger.wait(WAIT_S)
            stranger.take()
        events = listener.events(last_of(listener), kinds=["session"])
        server.model("tiny").close()
        assert next(events).kind == "session"
        assert stranger.take() == [] and not stranger.socket.poll(0, zmq.POLLIN)
    finally:
        stranger.close()
    with djinn.connect(served.tcp) as other:
        assert where(other).scope not in ("", "all", asked.scope)
        assert all(event.kind == "engine" for event in other.events().so_far())


def test_over_tcp_and_from_asyncio_code_they_come_too(served):
    async def main() -> None:
        async with aio.connect(served.tcp) as server:
            events = server.events(kinds=["session"])
            with pytest.raises(TypeError, match="async for"):
                next(events)
            model = await server.model("tiny")
            async for event in events:
                assert event.session == model.session_id
                break
            assert [one.kind for one in await server.events(event.number).so_far()] == []
            coming = asyncio.ensure_future(anext(events))
            await model.close()
            assert (await asyncio.wait_for(coming, WAIT_S)).text.endswith("ends")
            events.close()

    asyncio.run(main())


def test_it_ends_with_its_connection_and_a_wrong_kind_is_refused(served, serve):
    with served.connect() as server:
        with pytest.raises(errors.RequestError, match="kinds='runs'"):
            server.events(kinds=["runs"])
        events = server.events(last_of(server))
        with events:
            pass
        assert list(events) == []
        events = server.events(last_of(server))
    with pytest.raises(errors.Closed):
        next(events)
    with serve() as running:
        server = running.connect()
        events = server.events(last_of(server), kinds=["session"])
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(next, events)
            server.ping()
            assert running.end() == 0
            # Closed: its last question came when the server had been told to stop.
            with pytest.raises((errors.Lost, errors.Closed)):
                waiting.result(WAIT_S)
        server.close()
