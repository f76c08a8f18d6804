"""Sweeps and attention of checkpoints that go on from a past, against one resume a branch and the
model's own cached forward."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.client.indexing import index_of
from djinn_zmq.engine.jobs import batches, sweeping
from djinn_zmq.engine.jobs.looking import Looker
from djinn_zmq.engine.jobs.sweeping import Sweeper
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import LayerError, Lost, RequestError, SweepTooLarge
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire import looks, sweeps
from djinn_zmq.wire.messages import Wanted
from djinn_zmq.wire.stops import Break, Stops
from djinn_zmq.wire.tensors import inline, view
from tests.engine.architectures import prompts
from tests.engine.conftest import keeping_with
from tests.engine.talking import LIMITS, STATIC, Talk, both, own_cache_name

# Masks that differ by layer, windows shorter than the past, alibi, a convolution's state.
NAMES = ["Llama", "Gemma2", "Mistral", "GPT2", "GPTJ", "Bloom", "GptOss", "Lfm2"]
ALL = sweeps.Results("last", 0, ())
BRANCHES = (
    (),
    (wire.Zero(index_of((0, -1))),),
    (wire.Scale(0.5, ()),),
    (wire.Add(inline(np.linspace(-1, 1, 32, dtype=np.float32)), index_of((0, -1))),),
)


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Iterator[None]:
    yield
    both.cache_clear()


@pytest.fixture(scope="module")
def keeping() -> Iterator[Keeping]:
    with keeping_with(LIMITS) as one:
        yield one


@pytest.fixture(autouse=True)
def _gives_all_back(keeping: Keeping) -> Iterator[None]:
    yield
    keeping.drop(list(keeping.entries))
    keeping.settle()
    assert keeping.pool.used == 0


def swept(talk: Talk, number: int, keeping: Keeping, memory: int = 0) -> tuple[Any, list[Any]]:
    asked = sweeps.Sweep(number, BRANCHES, ALL, memory)
    sweeper = Sweeper(keeping, talk.runner)
    job, turns = sweeper.sweep(asked, (), talk.session, talk.model, Stopwatch(), shared=False)
    rows = []
    for part in turns:
        if part is not None:
            rows.extend(view(part.meta.outcomes.logits, part.buffers))
    return job, [torch.from_numpy(np.array(row)) for row in rows]


def close(found: Any, expected: Any) -> None:
    """Within 1e-5 of the largest logit."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
def test_a_sweep_behind_a_past_equals_one_resume_a_branch(
    keeping: Keeping, name: str, static: int
) -> None:
    talk = Talk(keeping, both(name, torch.float32)[0], static)
    heard = talk.generate(prompts(1), wanted=Wanted(None, (0, 2), "last", 0), steps=(0, 3))
    assert heard.reason == "length"
    for point in talk.kept:
        held = talk.session.account.nbytes
        job, found = swept(talk, point.id, keeping)
        assert job.cost.layers == len(BRANCHES) * (talk.model.info.num_layers - point.layer)
        for row, edits in zip(found, BRANCHES, strict=True):
            close(row, talk.resume(point.id, edits=edits).logits)
        del job
        talk.session.branches.clear()
        assert talk.session.account.nbytes <= held
    assert len({row.numpy().tobytes() for row in found}) == len(BRANCHES)


@pytest.mark.parametrize("name", ["Llama"])
def test_a_sweep_behind_a_past_starts_inside_a_layer_and_is_cut_by_memory(
    keeping: Keeping, name: str
) -> None:
    talk = Talk(keeping, both(name, torch.float32)[0])
    talk.run(prompts(1))
    wanted = Wanted(Stops((Break("layers.1.mlp", ()),), ()), (), "last", 0)
    point = talk.run(prompts(1, 2), wanted).kept[-1]
    _, found = swept(talk, point.id, keeping)
    for row, edits in zip(found, BRANCHES, strict=True):
        close(row, talk.resume(point.id, edits=edits).logits)
    with pytest.raises(SweepTooLarge, match="1000 B may be used"):
        swept(talk, point.id, keeping, memory=1000)
    entry = keeping.entries[point.id]
    past = sweeping._past_nbytes(entry.midway, entry.layer)
    two = 2 * (batches._row_nbytes(talk.model, 2) + past)
    job, again = swept(talk, point.id, keeping, memory=two)
    assert past > 0 and job.cost.batches == 2
    for row, other in zip(found, again, strict=True):
        close(row, other)
    keeping.entries[point.id].midway = None  # as a successor of the engine adopts it
    with pytest.raises(Lost, match="keys and values of 13 tokens"):
        swept(talk, point.id, keeping)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "GPT2", "Bloom"])
@pytest.mark.parametrize("static", [0, STATIC], ids=["dynamic", "static"])
def test_attention_reaches_into_the_past_as_the_models_own_does(
    keeping: Keeping, name: str, static: int
) -> None:
    served, own = both(name, torch.float32)
    talk = Talk(keeping, served, static)
    talk.run(prompts(1))
    point = talk.run(prompts(1, 3), Wanted(1, (), "none", 0)).kept[-1]
    raw = talk.runner._keeping.hidden(keeping.entries[point.id]).clone()
    implementation = own.config._attn_implementation
    own.set_attn_implementation("eager")
    try:
        cache = own(input_ids=prompts(1), use_cache=True)[own_cache_name(own)]
        more = {own_cache_name(own): cache, "output_attentions": True}
        expected = own(input_ids=prompts(1, 3), use_cache=True, **more).attentions
    finally:
        own.set_attn_implementation(implementation)
    for layer in (2, served.info.num_layers):
        found = looked(talk, keeping, looks.Attention(point.id, layer))
        assert found.shape == expected[layer - 1].shape and found.shape[2] == 3
        torch.testing.assert_close(found, expected[layer - 1], atol=1e-5, rtol=1e-4)
    assert torch.equal(talk.runner._keeping.hidden(keeping.entries[point.id]), raw)
    with pytest.raises(LayerError, match="lies behind"):
        looked(talk, keeping, looks.Attention(point.id, 1))


def looked(talk: Talk, keeping: Keeping, asked: Any) -> Any:
    looker = Looker(keeping, talk.runner)
    made = looker.begin(looks.Look(asked), (), talk.session, talk.model, Stopwatch(), shared=False)
    job, turns = made
    for _ in turns:
        pass
    return job.seen[0]


@pytest.mark.parametrize("name", ["Llama"])
def test_another_sessions_checkpoint_is_not_swept(keeping: Keeping, name: str) -> None:
    talk = Talk(keeping, both(name, torch.float32)[0])
    (point,) = talk.run(prompts(1), Wanted(1, (), "last", 0)).kept
    with pytest.raises(RequestError, match="only a checkpoint of this session"):
        swept(Talk(keeping, talk.model), point.id, keeping)
