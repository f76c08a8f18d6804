"""What jobs keep where memory is full: others' checkpoints give way to it, whatever it is."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.settings import KIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.messages import Run, Wanted
from djinn_zmq.wire.stops import Break, Stops
from djinn_zmq.wire.tensors import inline
from tests.engine.architectures import prompts
from tests.engine.keepers import IDS, OWNER, ServerSide, running
from tests.engine.talking import both

LONG = prompts(8, 40)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Keeping]:
    """A disk tier, and checkpoints that fill host memory and are not there yet."""
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, state=tmp_path) as keeping,
    ):
        data = torch.zeros(512 * KIB, dtype=torch.uint8)
        for _ in range(4):
            keeping.keep(data, session=9, owner=OWNER, run=9, layer=1, ids=IDS)
        assert not keeping.fits(1, OWNER) and not keeping.disk.used
        yield keeping


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(None, (), "all", 0),
        Wanted(Stops((Break("layers.1.mlp", ()),), ()), (), "none", 0),
        Wanted(2, (), "none", 0),
    ],
    ids=["logits", "inside of a layer", "between two"],
)
def test_what_a_run_keeps_waits_until_others_have_given_way(full: Keeping, wanted: Wanted) -> None:
    model = both("Llama", torch.float32)[0]
    session = EngineSession(1, OWNER, "it")
    asked = Run((), inline(LONG.numpy()), wanted)
    job, turns = Runner(full).begin(asked, (), session, model, Stopwatch(), shared=True)
    for _ in turns:
        pass
    assert str(job.state) in ("finished", "stopped")
    assert job.everything_kept and full.disk.used
