"""What the engines say, and how they end."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from djinn_zmq.errors import Busy
from djinn_zmq.memory.arena import OwnArena
from djinn_zmq.memory.ring import HEAD
from djinn_zmq.server.engines import HELD_LIMIT
from djinn_zmq.settings import KIB
from djinn_zmq.wire import codec, messages, states
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Where
from tests.server.serving import Served, deaths_of, joined, keep, told


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


def test_all_that_a_dead_engine_has_said_is_heard(served: Served) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 5001))
    served.lease.close()
    deaths = deaths_of(served)
    assert served.engine.link is not None and served.engine.lease is not None
    watched = {served.engine.link.lane.fileno(), served.engine.lease.socket.fileno()}
    assert watched <= served.server._poll._ready.keys()
    served.until(lambda: deaths)
    assert len(served.server.registry.sessions[session].kept) == 5000
    assert not watched & served.server._poll._ready.keys()  # who follows may have the same numbers


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


def test_nothing_is_heard_behind_what_made_no_sense(served: Served) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    deaths = deaths_of(served)
    # The part of an answer, say: its end would pass for all of it.
    served.link.lane._out.put(0, b"nonsense")
    keep(served, session, range(1, 3))
    served.link.lane.ring()
    served.until(lambda: deaths)
    assert not served.server.registry.sessions[session].kept


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


def test_what_is_asked_waits_until_its_reply_and_not_until_a_part_of_it(served: Served) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    waits = served.server.registry.sessions[session]
    client.send(codec.encode(Op.PING, messages.Ping(), request=7, session=session))
    served.until(lambda: waits.waiting)
    assert list(served.engine.owed) == [(session, 7)]
    *_, (envelope, _, _) = iter(served.link.receive, None)
    said = (Flag.PROGRESS, Flag.PART, Flag.REPLY, Flag.REPLY)
    for flags, waiting in zip(said, (1, 1, 0, 0), strict=True):
        meta = messages.Pong("idle")
        answer = codec.encode(Op.PING, meta, flags=flags, request=7, session=session)
        served.link.send(envelope, answer)
        served.until(lambda: client.socket.poll(0))
        assert client.receive() == (answer, [])
        assert (waits.waiting, len(served.engine.owed)) == (waiting, waiting)


def test_an_engine_that_does_not_read_its_news_has_them_when_it_does(served: Served) -> None:
    assert served.engine.lease is not None
    count = 0
    while len(served.engine.lease.unsent) < 10:
        count += 1
        served.engine.retire(count)
    heard: list[Any] = []

    def all_heard() -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(served.lease.receive()[0])
        return len(heard) == count

    served.until(all_heard)
    assert heard == [messages.Retire(number) for number in range(1, count + 1)]
    assert not served.engine.lease.unsent


def fill(served: Served) -> Callable[[], int]:
    """The engine reads nothing. Returns how many messages wait beside those that it has room for."""
    assert served.engine.link is not None
    lane = served.engine.link.lane
    lane._high_water = 4
    with contextlib.suppress(Busy):
        while True:
            lane.send(b"", bytes(lane._fragment))
    return lambda: len(lane._backlog)


def test_what_a_client_brings_about_without_end_does_not_wait_without_end_for_an_engine_that_is_busy(
    served: Served,
) -> None:
    client, other = served.connect(served.ipc), served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 2))
    served.link.lane.ring()
    served.until(lambda: served.server.registry.sessions[session].kept)
    waiting = fill(served)
    before = waiting()
    for number in (5, 6, 7):  # which might be holds
        meta, flags = messages.Release((number,)), Flag.ONE_WAY
        client.send(codec.encode(Op.RELEASE, meta, request=1, session=session, flags=flags))
        with pytest.raises(Busy, match="queue is full"):
            served.ask(client, Op.OPEN, messages.Open("tiny"))
        with pytest.raises(Busy, match="queue is full"):
            served.ask(other, Op.WHERE, Where((1,)), session=session)
    assert waiting() == before
    assert list(served.server.registry.sessions) == [session]
    served.ask(client, Op.RELEASE, messages.Release((1,)), session=session)
    served.ask(client, Op.CLOSE, messages.Close(), session=session)
    assert waiting() == before + 2  # what is so is told: there is only so much of it


def test_an_engine_hears_of_what_it_alone_can_know_to_be_released_unless_it_is_only_coming_up(
    served: Served,
) -> None:
    client = served.connect(served.ipc)
    session = served.ask(client, Op.OPEN, messages.Open("tiny")).session
    keep(served, session, range(1, 2))
    served.link.lane.ring()
    served.until(lambda: served.server.registry.sessions[session].kept)
    for number in (5, 6, 1):
        meta, flags = messages.Release((number,)), Flag.ONE_WAY
        client.send(codec.encode(Op.RELEASE, meta, request=1, session=session, flags=flags))
        served.ask(client, Op.PING, messages.Ping())  # behind it
        served.engine.state = states.Engine.STARTING
    assert [codec.decode(*one[1:]).meta for one in served.engine._held] == [messages.Drop((1,))]
    served.engine.state = states.Engine.READY
    said = [codec.decode(*one[1:]).meta for one in iter(served.link.receive, None)]
    assert [meta for meta in said if isinstance(meta, messages.Drop)] == [messages.Drop((5,))]


def test_a_session_that_goes_to_and_fro_while_its_engine_comes_up_does_not_do_so_without_end(
    served: Served,
) -> None:
    clients = [served.connect(served.ipc) for _ in range(2)]
    session = served.ask(clients[0], Op.OPEN, messages.Open("tiny")).session
    served.engine.state = states.Engine.STARTING
    served.engine._held_asked = HELD_LIMIT - 1
    with pytest.raises(Busy, match=f"engine 0 is starting and {HELD_LIMIT} messages wait for it"):
        for client in reversed(clients):
            served.ask(client, Op.WHERE, Where(()), session=session)
    assert len(served.engine._held) == 1
    served.engine.state = states.Engine.READY
