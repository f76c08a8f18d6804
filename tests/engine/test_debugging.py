"""Debuggers beside a device that takes its time: what they are told of is there, what they send is used."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.debugging import Debugging
from djinn_zmq.engine.jobs.job import EngineSession, Halt
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.settings import KIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.attach import Attach, GoOn
from djinn_zmq.wire.codec import MAGIC, Header
from djinn_zmq.wire.messages import Run, Wanted
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.stops import Break
from djinn_zmq.wire.tensors import inline
from tests.engine.architectures import prompts
from tests.engine.keepers import IDS, OWNER, Late, ServerSide, running
from tests.engine.talking import both

IDS_RUN = prompts(1)


class Attached:
    """A program's session whose runs a debugger holds after layer 1, driven as the loop would."""

    def __init__(self, keeping: Keeping, device: Late) -> None:
        self.keeping, self.device = keeping, device
        self.model = both("Llama", torch.float32)[0]
        program, debugger = (EngineSession(number, OWNER, "Llama") for number in (1, 2))
        self.debugger, self.runner = debugger, Runner(keeping)
        self.told: list[Any] = []
        self.answered: list[Any] = []
        answers: Any = SimpleNamespace(
            answer=lambda envelope, header, meta: self.answered.append((header.op, meta)),
            part=lambda envelope, header, meta, buffers: self.told.append(meta),
            tell=lambda *_: None,
        )
        telling: Any = SimpleNamespace(kept=lambda *_: None)
        sessions = {1: program, 2: debugger}
        self.debugging = Debugging(
            keeping, self.runner, Turns(), answers, telling, sessions, lambda _: self.model
        )
        header = Header(MAGIC, 1, int(Op.ATTACH), 0, 0, 5, 2, 0, 8)
        asked: Any = SimpleNamespace(meta=Attach(1, (Break(1, ()),)), header=header)
        self.debugging.attach(b"d", asked, debugger, 0)
        run = Run((), inline(IDS_RUN.numpy()), Wanted(None, (), "last", 0))
        job, turns = self.runner.begin(run, (), program, self.model, Stopwatch(), shared=False)
        header = Header(MAGIC, 1, int(Op.RUN), 0, 0, 6, 1, 0, 0)
        self.active = Active(job, turns, b"p", header)

    def turn(self) -> Any:
        self.active.held = next(self.active.turns)
        return self.active.held

    def held(self) -> Halt:
        while not isinstance(halt := self.turn(), Halt):
            pass
        self.debugging.hold(self.active)
        return halt


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Iterator[None]:
    yield
    both.cache_clear()


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    device = Late()
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, device, device_memory=4096 * KIB) as keeping,
    ):
        one = Attached(keeping, device)
        yield one
        one.active.turns.close()
        keeping.moves.clear()
        device.copies.clear()


def press(attached: Attached) -> None:
    """Others keep more than there is room for in host memory."""
    for _ in range(6):
        data = torch.zeros(1, 450, KIB // 4)
        attached.keeping.keep(data, session=9, owner=OWNER, run=9, layer=1, ids=IDS)
        attached.device.finish()


def test_a_stop_is_told_when_the_device_is_through_and_with_where_its_bytes_are_then(
    attached: Attached,
) -> None:
    attached.device.busy = True
    while not attached.device.copies:
        attached.turn()
    assert attached.turn() is None  # the layers are not through yet
    attached.device.finish()
    press(attached)
    assert [meta.number for meta in attached.told] == [0]
    attached.device.busy = False
    halt = attached.held()
    attached.keeping.tiers.fill()
    (kept,) = attached.told[-1].checkpoints
    assert attached.keeping.entries[kept.id].kept == kept
    assert same_bits(attached.keeping.load(kept.tensor), halt.value)
    assert attached.keeping.entries[kept.id].body.idle  # from here on it moves like any other


def test_a_program_that_gives_up_before_its_stop_is_told_leaves_nothing_with_the_debugger(
    attached: Attached,
) -> None:
    attached.device.busy = True
    while not attached.keeping.entries:
        attached.turn()
    attached.active.turns.close()
    assert not attached.keeping.entries


def test_what_a_debugger_sends_is_its_own_again_only_when_the_device_has_it(
    attached: Attached,
) -> None:
    halt = attached.held()
    sent = np.full(halt.value.shape, 0.5, np.float32)
    attached.device.busy = True
    asked = GoOn(halt.number, inline(sent), ())
    args = asked, (), attached.debugger, attached.model, Stopwatch()
    job, turns = attached.debugging.go_on(*args, shared=False)
    assert next(turns) is None and attached.active.halt is None  # the program goes on meanwhile
    assert same_bits(halt.value, torch.from_numpy(sent)) and job.state == "running"
    attached.device.busy = False
    assert list(turns) == [] and job.state == "finished"


@pytest.mark.parametrize("goes", ["leave", "let_go"])
def test_an_attachment_is_answered_though_its_debugger_be_gone_for_the_server_owes_the_answer(
    attached: Attached, goes: str
) -> None:
    getattr(attached.debugging, goes)(attached.debugger)
    ((op, meta),) = attached.answered
    assert op == Op.ATTACH and meta.reason.startswith("the debugger's")
