"""Listening to what happens on a server: each event is told once, whatever is lost on the way."""

import random
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from djinn_zmq.bus.news import ALL
from djinn_zmq.client import events as room
from djinn_zmq.client.events import NONE_BEHIND, Events
from djinn_zmq.errors import Busy, Closed, Lost
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Event, EventsReply, Published

BEFORE = Event(1, 0.0, "session", 0, "it was", 0, 0)


class Quiet:
    """Is listened to at once, and hears nothing."""

    holds = True

    def __init__(self, *_: object) -> None:
        self.closed = False
        made.append(self)

    def take(self) -> list[tuple[bytes, bytes]]:
        return []

    def close(self) -> None:
        self.closed = True


made: list[Quiet] = []


def answered(*events: Event) -> Any:
    return SimpleNamespace(meta=EventsReply(events, "tcp://*:1", "scope"))


def test_who_could_not_begin_to_listen_begins_anew_and_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made.clear()
    monkeypatch.setattr(room, "Subscriber", Quiet)
    connection = SimpleNamespace(closed=False, endpoint="tcp://host:2", settings=None, keys=None)
    events = Events(SimpleNamespace(connection=connection), (), 0)
    asking = events._next()
    next(asking)
    asking.send(answered())  # where they are published; then what was before is asked for
    with pytest.raises(Lost):
        asking.throw(Lost("no answer"))
    assert [one.closed for one in made] == [True]

    asking = events._next()
    next(asking)
    asking.send(answered())
    asking.send(answered(BEFORE))
    with pytest.raises(StopIteration) as end:
        asking.send(answered())
    assert end.value.value == BEFORE
    assert [one.closed for one in made] == [True, False]
    events.close()
    assert [one.closed for one in made] == [True, True]


def test_who_closes_while_another_waits_leaves_it_to_that_one_to_hang_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made.clear()
    monkeypatch.setattr(room, "Subscriber", Quiet)
    answers = iter([answered(), answered()])
    connection = SimpleNamespace(closed=False, endpoint="tcp://host:2", settings=None, keys=None)
    connection.drive, connection.look = lambda _: next(answers), lambda: None
    events, open_at = Events(SimpleNamespace(connection=connection), (), 0), []

    def wait(_: Quiet, timeout_s: float) -> None:
        """Meanwhile another thread closes it."""
        thread = threading.Thread(target=events.close)
        thread.start()
        thread.join()
        open_at.append(not made[0].closed)

    monkeypatch.setattr(Quiet, "wait", wait, raising=False)
    assert list(events) == []
    assert open_at == [True] and made[0].closed


def test_who_asks_for_an_event_that_another_waits_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made.clear()
    monkeypatch.setattr(room, "Subscriber", Quiet)
    answers = iter([answered(), answered(), answered(BEFORE), answered()])
    server: Any = SimpleNamespace(connection=SimpleNamespace(closed=False, endpoint="tcp://host:2"))
    server.connection.settings = server.connection.keys = None
    server.connection.drive, server.connection.look = lambda _: next(answers), lambda: None
    events, others = Events(server, (), 0), [next, lambda events: next(events._so_far())]

    def wait(_: Quiet, timeout_s: float) -> None:
        """Meanwhile others ask, as threads or tasks would."""
        other = others.pop()
        with pytest.raises(Busy, match="awaited already"):
            other(events)
        if not others:
            events.close()

    monkeypatch.setattr(Quiet, "wait", wait, raising=False)
    assert list(events) == [] and made[0].closed and len(made) == 1
    assert next(answers).meta.events == (BEFORE,)  # nobody has asked a second time


KINDS = ("engine", "session", "run")  # of which the first are everybody's


class World:
    """A server whose journal tells a few at a time, and whose publications may be lost."""

    def __init__(self, seed: int, lost: float) -> None:
        self.random, self.lost = random.Random(seed), lost
        self.journal: list[Event] = []
        self.queue: deque[tuple[bytes, bytes]] = deque()  # what has been published, and heard
        self.topics: list[str] = []
        self.before: dict[str, int] = {}
        self.asked = 0
        self.left = 40  # events still to happen
        self.connection: Any = SimpleNamespace(closed=False, endpoint="tcp://host:2")
        self.connection.settings = self.connection.keys = None
        self.connection.drive, self.connection.look = self.drive, lambda: None

    def happen(self) -> None:
        if not self.left:
            self.connection.closed = not self.queue
            return
        self.left -= 1
        last = self.left < len(KINDS)  # one of each kind, which come
        number = len(self.journal) + 1
        kind = KINDS[self.left] if last else self.random.choice(KINDS)
        event = Event(number, 0.0, kind, 0, "", 0, 0)
        self.journal.append(event)
        topic = f"{ALL if kind == KINDS[0] else 'scope'}/{kind}"
        meta = Published(event, self.before.get(topic, 0))
        self.before[topic] = number
        heard = any(topic.startswith(one) for one in self.topics)
        if heard and (last or self.random.random() >= self.lost):
            self.queue.append((topic.encode(), codec.encode(Op.EVENTS, meta, flags=Flag.PART)))

    def drive(self, operation: Any) -> Any:
        call = next(operation)
        self.asked += call.meta.after != NONE_BEHIND
        found = [event for event in self.journal if event.number > call.meta.after][:3]
        for _ in range(self.random.randrange(3)):
            self.happen()  # while the answer is on its way
        return answered(*found)

    # as a Subscriber
    holds = True

    def take(self) -> list[tuple[bytes, bytes]]:
        found = list(self.queue)
        self.queue.clear()
        return found

    def wait(self, timeout_s: float) -> None:
        for _ in range(self.random.randrange(1, 5)):
            self.happen()

    def close(self) -> None:
        pass


def told(world: World, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all that is told until the connection is closed."""

    def subscribed(endpoint: str, settings: Any, keys: Any, topics: list[str]) -> World:
        world.topics = topics
        return world

    monkeypatch.setattr(room, "Subscriber", subscribed)
    monkeypatch.setattr(room, "TAKEN_LIMIT", 5)
    server: Any = world
    events, found = Events(server, kinds, 0), []
    with pytest.raises(Closed):
        for event in events:
            found.append(event.number)
            assert len(events._taken) <= 6 and all(one > events._base for one in events._taken)
    return found


@pytest.mark.parametrize("kinds", [(), ("run",), ("engine", "session")])
@pytest.mark.parametrize("lost", [0.0, 0.3, 0.9])
def test_each_event_is_told_once_however_many_publications_are_lost(
    lost: float, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(20):
        world = World(seed, lost)
        found = told(world, kinds, monkeypatch)
        wanted = [one.number for one in world.journal if one.kind in (kinds or KINDS)]
        assert len(wanted) >= len(kinds) and sorted(found) == wanted
        assert lost or found == wanted


def test_who_misses_nothing_asks_the_journal_once_and_who_has_missed_something_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(0, 0.0)
    monkeypatch.setattr(world.random, "randrange", lambda *ends: len(ends) - 1)  # one at a wait
    monkeypatch.setattr(
        room, "Subscriber", lambda *asked: setattr(world, "topics", asked[3]) or world
    )
    server: Any = world
    events = Events(server, (), 0)
    begun = [next(events).number for _ in range(5)]
    asked = world.asked
    assert [next(events).number for _ in range(5)] == list(range(6, 11)) and begun[-1] == 5
    assert world.asked == asked
    world.happen()
    world.queue.clear()
    found = [next(events).number for _ in range(10)]
    assert world.asked > asked
    asked = world.asked
    found += [next(events).number for _ in range(10)]
    assert sorted(found) == list(range(11, 31)) and world.asked == asked


def test_what_so_far_has_told_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = World(0, 0.0)
    world.left = 0
    world.journal.append(BEFORE)
    events = Events(world, (), 0)
    answers: list[list[Event]] = []
    for _ in range(2):
        asking = events._so_far()
        step = next(asking)
        with pytest.raises(StopIteration) as end:
            while True:
                step = asking.send(world.drive(iter([step])))
        answers.append(end.value.value)
    assert answers == [[BEFORE], []]


def test_who_is_interrupted_as_he_waits_may_ask_again_though_the_error_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: Quiet, timeout_s: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "Subscriber", Quiet)
    monkeypatch.setattr(Quiet, "wait", interrupt, raising=False)
    server: Any = SimpleNamespace(connection=SimpleNamespace(closed=False, endpoint="tcp://host:2"))
    server.connection.settings = server.connection.keys = None
    server.connection.drive, server.connection.look = lambda _: answered(), lambda: None
    events = Events(server, (), 0)
    with pytest.raises(KeyboardInterrupt) as first:
        next(events)
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert first.value.__traceback__ is not None
