"""What becomes of jobs that end before they are done."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.keeping import Keeping
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import Cancelled
from djinn_zmq.wire.codec import MAGIC, Header
from djinn_zmq.wire.messages import Wanted
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
