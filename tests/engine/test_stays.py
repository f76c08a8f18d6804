"""Resumes that stop where they begin, beside a device that takes its time."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.jobs import EngineSession
from djinn_zmq.engine.keeping import Keeping
from djinn_zmq.engine.stays import Stays
from djinn_zmq.engine.stepping import same_bits
from djinn_zmq.errors import Cancelled, EditError
from djinn_zmq.settings import KIB
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.edits import Zero
from djinn_zmq.wire.messages import Resume, Wanted
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Inline, Tensor
from tests.engine.keepers import IDS, OWNER, Late, ServerSide, running

STAY = Wanted(2, (), "none", 0)


class Engine:
    """What of an engine a stay needs; asked, told and answered in lists."""

    def __init__(self, keeping: Keeping, device: Late) -> None:
        self.keeping, self.device = keeping, device
        self.session = EngineSession(1, OWNER, "tiny")
        self.said: list[tuple[Any, ...]] = []
        answers: Any = SimpleNamespace(
            answer=lambda envelope, header, reply, store: self.said.append((envelope, reply)),
            refuse=lambda envelope, header, error: self.said.append((envelope, error)),
        )
        telling: Any = SimpleNamespace(kept=lambda ids, kept, _: self.said.append(("kept", kept)))
        self.stays = Stays(keeping, answers, telling, self._failed)
        self.data = torch.randn(2, 5, 8)
        kept = keeping.keep(self.data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
        self.point = kept.id

    def _failed(self, error: Exception) -> None:
        """The device goes on working."""

    def ask(
        self, *, hidden: Any = None, wanted: Wanted = STAY, envelope: bytes = b"a", **more: Any
    ):
        placed = None
        if hidden is not None:
            raw = hidden.numpy().tobytes()
            placed = Tensor("float32", tuple(hidden.shape), Inline(raw))
        meta = Resume(self.point, placed, more.get("edits", ()), wanted)
        header = Header(b"DJ", 1, Op.RESUME, 0, 0, 5, 1, 0, 0)
        return self.stays.begin(meta, (), self.session, envelope, header, 0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    device = Late()
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, device, device_memory=1024 * KIB) as keeping,
    ):
        engine = Engine(keeping, device)
        device.finish()
        keeping.tiers.fill()
        yield engine
        device.copies.clear()


def test_what_is_where_layers_read_it_is_answered_at_once_and_told_of_first(engine: Engine) -> None:
    assert engine.ask()
    (told, kept), (envelope, reply) = engine.said
    assert (told, envelope) == ("kept", b"a")
    assert reply.checkpoints == kept and (reply.state, reply.layer) == ("stopped", 2)
    assert same_bits(engine.keeping.load(kept[0].tensor), engine.data)
    assert not engine.stays


def test_what_is_sent_in_its_place_is_answered_when_the_device_has_it(engine: Engine) -> None:
    engine.device.busy = True
    sent = torch.randn(2, 5, 8)
    assert engine.ask(hidden=sent)
    engine.stays.answer()
    assert engine.stays and not engine.said
    engine.device.busy = False
    engine.stays.answer()
    assert not engine.stays and engine.said[-1][1].state == "stopped"
    engine.device.finish()
    engine.keeping.tiers.fill()
    assert same_bits(engine.keeping.load(engine.said[-1][1].checkpoints[0].tensor), sent)


def test_who_asks_again_meanwhile_is_the_one_who_is_answered_and_once(engine: Engine) -> None:
    engine.device.busy = True
    assert engine.ask(hidden=engine.data) and engine.ask(hidden=engine.data, envelope=b"b")
    engine.device.busy = False
    engine.stays.answer()
    assert [one[0] for one in engine.said] == ["kept", b"b"]


def test_a_session_that_ends_meanwhile_is_told_so(engine: Engine) -> None:
    engine.device.busy = True
    assert engine.ask(hidden=engine.data)
    engine.stays.end(1, Cancelled("its session was closed"))
    ((envelope, error),) = engine.said
    assert envelope == b"a" and isinstance(error, Cancelled) and not engine.stays


def test_a_device_that_fails_meanwhile_is_an_error_of_that_request(engine: Engine) -> None:
    def fails() -> bool:
        raise RuntimeError("CUDA error")

    engine.device.computed = lambda: fails
    assert engine.ask(hidden=engine.data)
    ((_, error),) = engine.said
    assert "RuntimeError: CUDA error" in str(error) and not engine.stays


def test_an_array_of_another_shape_is_refused_and_nothing_is_kept(engine: Engine) -> None:
    before = sorted(engine.keeping.entries)
    with pytest.raises(EditError, match="hidden has shape"):
        engine.ask(hidden=torch.zeros(2, 5, 4))
    assert sorted(engine.keeping.entries) == before and not engine.said


@pytest.mark.parametrize(
    ("wanted", "edits"),
    [
        (Wanted(3, (), "none", 0), ()),
        (Wanted(2, (2,), "none", 0), ()),
        (Wanted(2, (), "top", 5), ()),
        (STAY, (Zero(()),)),
    ],
)
def test_what_has_more_to_do_is_a_job(engine: Engine, wanted: Wanted, edits: Any) -> None:
    assert not engine.ask(wanted=wanted, edits=edits)
    assert not engine.said


def test_a_debuggers_session_is_served_by_jobs_alone(engine: Engine) -> None:
    engine.session.attached = SimpleNamespace()
    assert not engine.ask()
