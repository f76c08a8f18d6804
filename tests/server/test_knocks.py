"""When to knock, once a connection has ended."""

import pytest

from djinn_zmq.server.knocks import KNOCKS_S, Knocks


def test_it_is_knocked_at_once_and_twice_later_at_the_peers_of_that_router_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    knocks = Knocks()
    assert knocks.due_s == float("inf") and list(knocks.take_due()) == []
    knocks.plan(b"t")
    for after_s in KNOCKS_S:
        now = 100.0 + after_s
        assert knocks.due_s == now
        assert list(knocks.take_due()) == [b"t"]
        assert list(knocks.take_due()) == []
    assert knocks.due_s == float("inf")


def test_knocks_that_were_missed_are_one_and_another_end_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    knocks = Knocks()
    knocks.plan(b"t")
    now = 100.0 + KNOCKS_S[1]
    assert list(knocks.take_due()) == [b"t"]
    knocks.plan(b"i")
    assert knocks.due_s == now
    assert list(knocks.take_due()) == [b"i"]
    knocks.plan(b"t")
    assert list(knocks.take_due()) == [b"t"]
    assert knocks.due_s == now + KNOCKS_S[1]
