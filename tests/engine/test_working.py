"""What becomes of jobs that end before they are done."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.device.devices import Broken, Cpu
from djinn_zmq.engine.jobs import replies
from djinn_zmq.engine.jobs.job import DoneJob, EngineSession, Halt, Part
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import Cancelled, DeadlineExceeded, PromptError, RunError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.codec import MAGIC, Header
from djinn_zmq.wire.messages import Progress, Wanted
from tests.engine.conftest import keeping_with
from tests.engine.talking import LIMITS, Talk, both


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    with keeping_with(LIMITS) as one:
        yield one


def nothing(*_: Any, **__: Any) -> None:
    pass


@pytest.fixture
def work(keeping: Keeping) -> Work:
    """Whose answers go nowhere."""
    silent: Any = SimpleNamespace(part=nothing, refuse=nothing, kept=nothing, over=nothing)
    talk = Talk(keeping, both("Llama", torch.float32)[0])
    return Work(Turns(), keeping, talk.runner.loans, silent, silent, silent, keeping.device)


@pytest.mark.parametrize("credit", [1, 0])
def test_a_job_that_is_cancelled_takes_back_what_its_client_was_not_told_of_and_no_more(
    keeping: Keeping, work: Work, credit: int
) -> None:
    talk = Talk(keeping, both("Llama", torch.float32)[0])
    wanted = Wanted(None, (2,), "none", 0)
    job, turns = talk.begin(np.array([[5, 6, 7]]), wanted=wanted)
    header = Header(MAGIC, 1, 16, 0, 0, 1, talk.session.id, 0, 0)
    active = Active(job, turns, b"", header, credit)
    work._turns.add(active)
    while active.held is None and active.credit == credit:
        work.step()  # until the first token is made, and said where its client takes it
    told = list(keeping.entries)
    assert len(told) == 1
    work.end(active, Cancelled("it was"))
    assert list(keeping.entries) == told * credit
    assert not any(entry.body.users for entry in keeping.entries.values())
    keeping.drop(told)


class Spy:
    """Notes what is called of it, with what."""

    def __init__(self, **attributes: Any) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: self.called.append((name, *args))

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.called]


class Fragile(Cpu):
    def broken(self, error: BaseException) -> str:
        return "its CUDA context is poisoned" if "CUDA" in str(error) else ""


class Bench:
    """Work with one job of the given turns, and what it does with that."""

    def __init__(self, turns: Iterator[Any], **header: int) -> None:
        self.keeping = Spy(vault=Spy(pressed=False))
        self.loans, self.answers, self.telling = Spy(), Spy(), Spy()
        self.debugging = Spy(tells=False)
        self.turns = Turns()
        self.work = Work(
            self.turns,
            *cast(Any, (self.keeping, self.loans, self.answers, self.telling, self.debugging)),
            Fragile(),
        )
        nothing: Any = SimpleNamespace(info=SimpleNamespace(name="it"))
        watch = Stopwatch(time.perf_counter_ns() - 10**9)
        self.job = DoneJob(EngineSession(1, "me", "it"), nothing, nothing, 0, nothing, False, watch)
        self.job.advance("start")
        deadline_ms = header.get("deadline_ms", 0)
        self.active = Active(
            self.job, turns, b"e", Header(MAGIC, 1, 16, 0, 0, 1, 1, deadline_ms, 0)
        )
        self.turns.add(self.active)

    def refused_with(self) -> BaseException:
        """Of a job that came to nothing, is over, and has been told so once."""
        ((name, _, _, error),) = self.answers.called
        assert name == "refuse" and "discard" in self.loans.names
        self.check_over()
        return error

    def check_over(self) -> None:
        assert self.turns.of(1) == []
        assert self.loans.names[-1] == "over" and "over" in self.debugging.names


def raising(error: BaseException) -> Iterator[None]:
    yield None
    raise error


def test_a_job_that_is_done_is_told_of_and_answered_and_over() -> None:
    bench = Bench(iter([None]))
    bench.work.step()
    assert bench.turns.of(1) and not bench.answers.called and bench.job.session.worked_ns > 0
    bench.job.advance("finish")
    bench.work.step()
    assert bench.answers.names == ["answer"] and bench.telling.names == ["kept", "held"]
    assert "ended" not in bench.debugging.names
    bench.check_over()


@pytest.mark.parametrize("error", [PromptError("too long"), ValueError("the model's own")])
def test_a_job_that_fails_is_refused_with_its_error(error: Exception) -> None:
    bench = Bench(raising(error))
    bench.work.step()
    bench.work.step()
    refused = bench.refused_with()
    assert str(error) in str(refused) and bench.job.state == "failed"
    assert refused is error or type(refused) is RunError


def test_a_job_that_finds_its_device_broken_ends_the_engine() -> None:
    bench = Bench(raising(RuntimeError("CUDA error")))
    bench.work.step()
    with pytest.raises(Broken):
        bench.work.step()


def test_a_job_whose_time_has_passed_is_worked_on_no_more() -> None:
    worked: list[bool] = []

    def turns() -> Iterator[None]:
        worked.append(True)
        yield None

    bench = Bench(turns(), deadline_ms=10)
    bench.work.step()
    assert isinstance(bench.refused_with(), DeadlineExceeded) and not worked
    assert bench.job.state == "cancelled"


@pytest.mark.parametrize("text", ["the model's own", "CUDA error"])
def test_a_job_that_fails_as_it_is_ended_is_over_all_the_same_or_ends_the_engine(text: str) -> None:
    def turns() -> Iterator[None]:
        try:
            yield None
        finally:
            raise RuntimeError(text)

    bench = Bench(turns())
    bench.work.step()
    if "CUDA" in text:
        with pytest.raises(Broken):
            bench.work.end(bench.active, Cancelled("it was"))
        return
    bench.work.end(bench.active, Cancelled("it was"))
    assert isinstance(bench.refused_with(), Cancelled) and bench.job.state == "cancelled"


@pytest.mark.parametrize("text", ["out of memory", "CUDA error"])
def test_a_job_whose_answer_cannot_be_made_is_refused_or_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(replies, "of", fail)
    bench = Bench(iter(()))
    if "CUDA" in text:
        with pytest.raises(Broken):
            bench.work.step()
        return
    bench.work.step()
    assert text in str(bench.refused_with()) and not bench.telling.called


def test_who_listens_to_runs_is_told_that_one_has_ended() -> None:
    bench = Bench(iter(()))
    bench.debugging.tells = True
    bench.job.advance("finish")
    bench.work.step()
    assert "ended" in bench.debugging.names


def test_a_part_is_told_of_and_handed_out_and_a_halt_is_its_debuggers() -> None:
    part, halt = Part(Progress("part", 0, 0)), object.__new__(Halt)
    bench = Bench(iter([part, part, halt]))
    bench.active.credit = 1
    bench.work.step()
    assert bench.answers.called == [("part", b"e", bench.active.header, part.meta, ())]
    assert bench.telling.names == ["kept"] and bench.active.held is None
    bench.work.step()
    assert bench.active.held is part and len(bench.answers.called) == 1 and not bench.turns
    bench.active.credit = 1
    bench.work.hand_out(bench.active)
    bench.active.credit = 1
    bench.work.step()
    assert bench.debugging.called == [("hold", bench.active)]
    bench.work.hand_out(bench.active)  # a halt is not handed out, whatever its client takes
    assert bench.active.held is halt and len(bench.answers.called) == 2


def test_a_chore_that_fails_or_ends_is_gone_and_keeps_no_other_from_its_steps() -> None:
    bench, steps = Bench(iter(())), []
    bench.turns.remove(bench.active)

    def others() -> Iterator[None]:
        for number in range(3):
            steps.append(number)
            yield

    bench.work.chores += [raising(ValueError("a mistake")), others()]
    for _ in range(5):
        bench.work.step()
    assert steps == [0, 1, 2] and not bench.work.chores
    bench.work.chores.append(raising(RuntimeError("CUDA error")))
    bench.work.step()
    with pytest.raises(Broken):
        bench.work.step()


def test_where_keys_and_values_are_pressed_when_a_job_ends_they_are_moved_out() -> None:
    bench = Bench(iter(()))
    bench.keeping.vault.pressed = True
    bench.keeping.vault.shrink = lambda: iter((None,))
    bench.job.advance("finish")
    bench.work.step()
    assert len(bench.work.chores) == 1
    bench.work.step()
    assert not bench.work.chores
