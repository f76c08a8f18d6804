"""What ends where the server says so: of a session that leaves, and of all where the server stops."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.models import loading
from djinn_zmq.engine.notices import Notices
from djinn_zmq.errors import (
    Cancelled,
    Closed,
    DjinnError,
    ModelRefused,
    StartError,
    UnknownModel,
)
from djinn_zmq.wire import codec
from djinn_zmq.wire.attach import LetGo
from djinn_zmq.wire.messages import Adopt, Drop, Enter, Flag, Leave, Load, ModelInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import inline
from djinn_zmq.wire.tiers import Shelve, Unclaimed

IT = ModelInfo("it", "", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")


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


class Loading:
    """An engine that is told to load a model; what it says, and what it has then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
        """outcome: what loading comes to, a model or an error."""
        self.said: list[codec.Message] = []
        self.prepared = 0
        self.loaded: dict[str, Any] = {}

        def load(asked: Any, device: Any, report: Any) -> Any:
            report("it: weights", 1, 2)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        def send(envelope: bytes, frame: bytes) -> None:
            assert not envelope
            self.said.append(codec.decode(frame))

        monkeypatch.setattr(loading, "load", load)
        link: Any = SimpleNamespace(send=send)
        keeping: Any = SimpleNamespace(arenas=SimpleNamespace(prepare=self._prepare))
        nothing: Any = SimpleNamespace(tell=None)
        self.notices = Notices(
            link, nothing, keeping, nothing, nothing, nothing, nothing, nothing, nothing, self.loaded, {}
        )  # fmt: skip
        frame = codec.encode(Op.LOAD, Load("it", "", "auto"))
        self.notices.take(codec.decode(frame))

    def _prepare(self) -> None:
        self.prepared += 1
        raise StartError("CUDA refuses to register an arena")


def test_a_model_that_is_loaded_is_said_to_be_also_where_no_memory_could_be_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SimpleNamespace(info=IT)
    engine = Loading(monkeypatch, model)
    progress, loaded = engine.said
    assert progress.header.flags == Flag.PROGRESS and progress.meta.stage == "it: weights"
    assert loaded.header.flags == Flag.REPLY and loaded.meta.model == IT
    assert engine.loaded == {"it": model} and engine.prepared == 1


@pytest.mark.parametrize("error", [UnknownModel("no such model"), ValueError("its own code")])
def test_a_model_that_cannot_be_loaded_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Loading(monkeypatch, error)
    refused = codec.error_of(engine.said[-1])
    assert str(refused).startswith("it: ") and str(error) in str(refused)
    assert type(refused) is (UnknownModel if isinstance(error, DjinnError) else ModelRefused)
    assert len(engine.said) == 2 and not engine.loaded and not engine.prepared


def test_a_session_that_another_process_speaks_for_stays_as_it_is() -> None:
    engine = Engine()
    engine.hear(Op.ENTER, Enter("me", "it", 11), 7)
    session = engine.sessions[7]
    assert (session.id, session.owner, session.model, session.pid) == (7, "me", "it", 11)
    engine.hear(Op.ENTER, Enter("me", "it", 12), 7)
    assert engine.sessions[7] is session and session.pid == 12


def test_what_a_client_is_gone_from_goes_on_where_there_is_such_a_session() -> None:
    engine = Engine()
    let_go: list[Any] = []
    engine.notices._debugging.let_go = let_go.append
    engine.hear(Op.LET_GO, LetGo(), 5)
    engine.hear(Op.LET_GO, LetGo(), 9)
    assert let_go == ["five"]


def test_what_the_server_hands_over_ends_with_the_first_message_about_something_else() -> None:
    engine = Engine()
    notices, finished, adopted = engine.notices, [], []
    keeping: Any = notices._keeping
    keeping.finish_adopting = lambda: finished.append(True)
    keeping.adopt = lambda kept, ids, owner, facts: adopted.append((owner, facts)) or []
    engine.sessions[7] = EngineSession(7, "me", "it")
    engine.hear(Op.ADOPT, Adopt(inline(np.ones((1, 2), np.int64)), (), (("a", "b"),)), 7)
    assert notices.adopting and adopted == [("me", {"a": "b"})]
    for op in (Op.ADOPT, Op.ENTER):
        notices.finish_adopting(op)
        assert notices.adopting and not finished
    notices.finish_adopting(Op.LOAD)
    assert not notices.adopting and finished == [True]


def test_what_is_dropped_goes_with_its_session_or_without() -> None:
    engine, dropped, told = Engine(), [], []
    keeping: Any = engine.notices._keeping
    keeping.drop = lambda numbers, session: dropped.append((tuple(numbers), session))
    engine.notices._telling = SimpleNamespace(held=told.append)
    session = engine.sessions[7] = EngineSession(7, "me", "it", branches={1: "a", 2: "b"})
    engine.hear(Op.DROP, Drop((1, 3)), 7)
    assert session.branches == {2: "b"} and told == [session]
    engine.hear(Op.DROP, Drop((4,)), 8)
    assert dropped == [((1, 3), 7), ((4,), 8)] and told == [session]


def test_what_files_of_nobodys_take_is_left_to_them() -> None:
    engine = Engine()
    disk = engine.notices._keeping.disk = SimpleNamespace(unclaimed=0)  # type: ignore[misc]
    engine.hear(Op.UNCLAIMED, Unclaimed(100))
    assert disk.unclaimed == 100
