"""What ends where the server says so: of a session that leaves, and of all where the server stops."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.notices import Notices
from djinn_zmq.errors import Cancelled, Closed
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import Leave
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Shelve


class Engine:
    """Two sessions, each with a run and a stay; what ended, with which error, and in which order."""

    def __init__(self) -> None:
        self.ended: list[tuple[Any, ...]] = []
        self.sessions: Any = {5: "five", 6: "six"}

        def ending(what: str) -> Any:
            return lambda whose, error=None: self.ended.append((what, whose, type(error)))

        stand_ins: dict[str, Any] = {
            "keeping": SimpleNamespace(drop_session=ending("kept")),
            "answers": SimpleNamespace(forget=ending("answers")),
            "turns": SimpleNamespace(of=lambda number: [f"a run of {number}"]),
            "work": SimpleNamespace(end=ending("run"), chores=[]),
            "stays": SimpleNamespace(end=ending("stays")),
            "debugging": SimpleNamespace(tell=None, leave=ending("debugging")),
        }
        nothing: Any = None
        self.notices = Notices(
            nothing, nothing, telling=nothing, loaded={}, sessions=self.sessions, **stand_ins
        )

    def hear(self, op: Op, meta: Any, session: int = 0) -> None:
        self.notices.take(codec.decode(codec.encode(op, meta, session=session)))


def test_a_session_that_leaves_ends_what_is_its_own_and_what_reads_its_memory_before_that() -> None:
    engine, nothing = Engine(), type(None)
    engine.hear(Op.LEAVE, Leave(), 5)
    assert sorted(engine.ended) == [
        ("answers", 5, nothing),
        ("debugging", "five", nothing),
        ("kept", 5, nothing),
        ("run", "a run of 5", Cancelled),
        ("stays", 5, Cancelled),
    ]
    assert engine.ended[-1][0] == "kept" and list(engine.sessions) == [6]
    engine.hear(Op.LEAVE, Leave(), 5)  # a second time: nothing of another's
    assert not [one for one in engine.ended if 6 in one]


def test_where_the_server_stops_all_that_runs_or_waits_is_ended_with_that_reason() -> None:
    engine = Engine()
    engine.hear(Op.SHELVE, Shelve((), 1.0))
    assert engine.notices.stopping
    assert sorted(engine.ended) == [
        ("run", "a run of 5", Closed),
        ("run", "a run of 6", Closed),
        ("stays", 5, Closed),
        ("stays", 6, Closed),
    ]
