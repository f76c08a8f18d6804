import itertools
from typing import Any

import pytest

from djinn_zmq.errors import ProtocolError
from djinn_zmq.wire import states

FIRST = {
    states.Run: states.Run.QUEUED,
    states.Session: states.Session.OPENING,
    states.Engine: states.Engine.STARTING,
}
TABLES: list[tuple[Any, Any]] = [
    (states.Run, states.RUN),
    (states.Session, states.SESSION),
    (states.Engine, states.ENGINE),
]
ENDS = [
    states.Run.STOPPED,
    states.Run.FINISHED,
    states.Run.CANCELLED,
    states.Run.FAILED,
    states.Session.CLOSED,
    states.Engine.STOPPED,
]
EVERY = [
    pytest.param(table, state, event, id=f"{kind.__name__}-{state}-{event}")
    for kind, table in TABLES
    for state, event in itertools.product(kind, sorted({e for row in table.values() for e in row}))
]


@pytest.mark.parametrize("table, state, event", EVERY)
def test_an_event_leads_where_the_table_says_or_is_refused_by_name(
    table: Any, state: Any, event: str
) -> None:
    following = table[state].get(event)
    if following is not None:
        assert states.advance(table, state, event) is following
        return
    with pytest.raises(ProtocolError) as refusal:
        states.advance(table, state, event)
    kind = type(state).__name__.lower()
    assert f'a {state} {kind} cannot "{event}"' in str(refusal.value)
    for allowed in table[state] or ("nothing",):
        assert allowed in str(refusal.value)


@pytest.mark.parametrize("kind, table", TABLES)
def test_every_state_has_a_row_and_can_be_reached(kind: Any, table: Any) -> None:
    assert set(table) == set(kind)
    reached, fresh = {FIRST[kind]}, [FIRST[kind]]
    while fresh:
        found = set(table[fresh.pop()].values()) - reached
        reached |= found
        fresh.extend(found)
    assert reached == set(kind)


@pytest.mark.parametrize("kind, table", TABLES)
def test_nothing_follows_an_end_and_something_follows_all_else(kind: Any, table: Any) -> None:
    # By identity: "failed" of a run and of an engine are equal strings.
    ends = [end for end in ENDS if isinstance(end, kind)]
    assert sorted(state for state in kind if not table[state]) == sorted(ends)


def test_a_run_may_fail_or_be_cancelled_until_it_has_ended() -> None:
    for state in (states.Run.QUEUED, states.Run.RUNNING):
        assert states.advance(states.RUN, state, "fail") is states.Run.FAILED
        assert states.advance(states.RUN, state, "cancel") is states.Run.CANCELLED


def test_a_session_that_is_kept_can_be_taken_up_again() -> None:
    state = states.Session.OPENING
    for event in ("loaded", "leave", "return", "leave", "close"):
        state = states.advance(states.SESSION, state, event)
    assert state is states.Session.CLOSED


def test_a_dead_engine_starts_again_and_one_that_was_given_up_may_be_started_once_more() -> None:
    state = states.Engine.STARTING
    for event in ("ready", "load", "die", "start", "ready", "give up"):
        state = states.advance(states.ENGINE, state, event)
    with pytest.raises(ProtocolError, match='a failed engine cannot "ready"'):
        states.advance(states.ENGINE, state, "ready")
    assert states.advance(states.ENGINE, state, "start") is states.Engine.STARTING
    assert states.advance(states.ENGINE, state, "stop") is states.Engine.STOPPED
