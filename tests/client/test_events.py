"""Listening to what happens on a server: what becomes of it where the beginning fails."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from djinn_zmq.client import events as room
from djinn_zmq.client.events import Events
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.wire.tiers import Event, EventsReply

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
