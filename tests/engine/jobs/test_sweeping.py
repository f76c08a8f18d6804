"""Sweeps and traces equal one resume a branch, on models whose layers are given very different things."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.jobs import batches
from djinn_zmq.engine.jobs.job import EngineSession, Job, Part
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.jobs.sweeping import Sweeper
from djinn_zmq.engine.jobs.tracing import Tracer
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import Stepper
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import EditError, PromptError, RequestError, SweepTooLarge
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire import sweeps
from djinn_zmq.wire.messages import ModelInfo, Resume, Run, Wanted
from djinn_zmq.wire.stops import Break, Stops
from djinn_zmq.wire.tensors import Tensor, inline, view
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model

# Bloom's layers are given alibi for each prompt and head, Gemma 2's a mask for each prompt.
NAMES = ["Llama", "Gemma2", "GPT2", "GPTJ", "GPTNeo", "Bloom", "Falcon", "OPT", "Mistral", "GptOss"]
MINE = EngineSession(1, "me", "it")
ALL = sweeps.Results("last", 0, ())
BRANCHES = (
    (),
    (wire.Zero((wire.Pick(0), wire.Pick(3))),),
    (wire.Scale(0.5, ()), wire.Zero((wire.Pick(0), wire.Pick(-1), wire.Stretch(0, 8, None)))),
    (wire.Scale(-1.0, (wire.Pick(1),)),),
    (wire.Add(inline(np.linspace(-1, 1, 32, dtype=np.float32)), (wire.Pick(1), wire.Pick(5))),),
)


@cache
def served(name: str, dtype: Any = torch.float32) -> ServedModel:
    stepper = Stepper(tiny_model(name, dtype))
    cpu = torch.device("cpu")
    stepper.check(VOCAB_SIZE, cpu)
    size = 4 if dtype == torch.float32 else 2
    info = ModelInfo(
        name, "", name, stepper.num_layers, 32, VOCAB_SIZE, 64, 1, size, "", "cpu", False, ""
    )
    return ServedModel(info, stepper, None, cpu)


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Iterator[None]:
    yield
    served.cache_clear()


@pytest.fixture
def runner(keeping: Keeping) -> Runner:
    return Runner(keeping)


@pytest.fixture
def sweeper(keeping: Keeping, runner: Runner) -> Sweeper:
    return Sweeper(keeping, runner)


@pytest.fixture
def tracer(keeping: Keeping, runner: Runner) -> Tracer:
    return Tracer(keeping, runner)


def done(made: tuple[Job, Any]) -> Job:
    job, turns = made
    for _ in turns:
        pass
    return job


def stopped(runner: Runner, model: ServedModel, stop: Any, ids: Any = None) -> int:
    """The number of a checkpoint at *stop*."""
    if isinstance(stop, str):
        stop = Stops((Break(stop, ()),), ())
    ids = prompts(2) if ids is None else ids
    asked = Run((), inline(ids.numpy()), Wanted(stop, (), "none", 0))
    return done(runner.begin(asked, (), MINE, model, Stopwatch(), shared=False)).kept[-1].id


def resumed(runner: Runner, model: ServedModel, number: int, edits: Any) -> Any:
    asked = Resume(number, None, edits, Wanted(None, (), "last", 0))
    return done(runner.resume(asked, (), MINE, model, Stopwatch(), shared=False)).logits


def outcomes(made: tuple[Job, Any]) -> tuple[Any, dict[int, Any], list[Part]]:
    """The job, the logits (batch, vocab) by branch, and the parts."""
    job, turns = made
    parts = [part for part in turns if part is not None]
    found = {}
    for part in parts:
        logits = array(part.meta.outcomes.logits, part.buffers)
        found.update(zip(part.meta.branches, torch.from_numpy(logits), strict=True))
    return job, found, parts


def array(tensor: Tensor | None, buffers: Any) -> np.ndarray:
    assert tensor is not None
    out = np.array(view(tensor, buffers))
    return out.astype(np.float32) if tensor.dtype == "bfloat16" else out


def sweep(sweeper: Sweeper, model: ServedModel, number: int, branches: Any, **more: Any) -> Any:
    asked = sweeps.Sweep(number, branches, more.get("results", ALL), more.get("memory", 0))
    return outcomes(sweeper.sweep(asked, (), MINE, model, Stopwatch(), shared=False))


def trace(tracer: Tracer, model: ServedModel, clean: Any, corrupted: Any, **more: Any) -> Any:
    asked = sweeps.Trace(
        inline(clean.numpy()),
        inline(corrupted.numpy()),
        more.get("layers", ()),
        more.get("positions", ()),
        more.get("results", ALL),
        more.get("memory", 0),
    )
    return outcomes(tracer.trace(asked, (), MINE, model, Stopwatch(), shared=False))


def close(found: Any, expected: Any) -> None:
    """Within 1e-5 of the largest logit."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_equals_one_resume_a_branch_at_every_layer(
    name: str, runner: Runner, sweeper: Sweeper
) -> None:
    model = served(name)
    depth = model.stepper.num_layers
    for layer in range(depth + 1):
        number = stopped(runner, model, layer)
        job, found, _ = sweep(sweeper, model, number, BRANCHES)
        assert sorted(found) == list(range(len(BRANCHES)))
        for branch, edits in enumerate(BRANCHES):
            close(found[branch], resumed(runner, model, number, edits))
        assert job.cost == sweeps.Cost(5, 0, 1, 5 * 2 * (depth - layer), 5 * 2 * depth)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_equals_one_patched_resume_a_cell(
    name: str, runner: Runner, tracer: Tracer
) -> None:
    model = served(name)
    clean, corrupted = prompts(1), prompts(1).clone()
    corrupted[0, 4] = (corrupted[0, 4] + 1) % VOCAB_SIZE
    positions = ((4,), (2,), (-1,), (4, 7))
    job, found, _ = trace(tracer, model, clean, corrupted, positions=positions)
    depth = model.stepper.num_layers
    assert job.layers == tuple(range(depth + 1)) and len(found) == 4 * (depth + 1)
    for layer in job.layers:
        here = stopped(runner, model, layer, corrupted)
        there = stopped(runner, model, layer, clean)
        for place, group in enumerate(positions):
            at = (wire.Pick(0), wire.Take(tuple(position % 11 for position in group)))
            expected = resumed(runner, model, here, (wire.Patch(there, at, at),))
            close(found[layer * 4 + place], expected)
        runner.loans.discard(job)
    # Position 2 comes before the difference: nothing flows there that is not the same.
    assert job.unchanged >= depth
    assert job.cost.layers < job.cost.layers_full


@pytest.mark.parametrize(
    "place", ["layers.1.mlp", "layers.1.self_attn.heads", "layers.0.mlp.input"]
)
def test_a_sweep_goes_on_from_inside_a_layer(place: str, runner: Runner, sweeper: Sweeper) -> None:
    model = served("Llama")
    number = stopped(runner, model, place)
    branches = [(wire.Zero((wire.Pick(0), wire.Pick(-1), wire.Pick(part))),) for part in range(4)]
    _, found, _ = sweep(sweeper, model, number, (*branches, ()))
    for branch, edits in enumerate((*branches, ())):
        close(found[branch], resumed(runner, model, number, edits))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Falcon"])
def test_in_bfloat16_a_sweep_differs_no_more_than_the_plain_models_own_batches_do(
    name: str, runner: Runner, sweeper: Sweeper
) -> None:
    model = served(name, torch.bfloat16)
    ids = prompts(1)
    number = stopped(runner, model, 1, ids)
    scales = [0.5 + part / 20 for part in range(20)]
    branches = tuple((wire.Scale(scale, ()),) for scale in scales)
    _, found, _ = sweep(sweeper, model, number, branches)
    worst = max(
        (found[branch] - resumed(runner, model, number, edits).float()).abs().max()
        for branch, edits in enumerate(branches)
    )
    alone = model.stepper.plain(ids)[:, -1].float()
    plains = [model.stepper.plain(ids.repeat(count, 1))[:, -1].float() for count in (2, 7, 20)]
    own = max((plain - alone).abs().max() for plain in plains)
    rounding = 2.0**-8 * alone.abs().max()  # of one number of eight bits
    assert worst <= max(own, rounding)


def test_a_sweep_too_large_for_memory_is_cut_into_batches(
    runner: Runner, sweeper: Sweeper, tracer: Tracer
) -> None:
    model = served("Bloom")
    number = stopped(runner, model, 1)
    whole = sweep(sweeper, model, number, BRANCHES)[1]
    one = 2 * batches._row_nbytes(model, 11)
    job, found, parts = sweep(sweeper, model, number, BRANCHES, memory=2 * one)
    assert job.cost.batches == 3
    assert [part.meta.done for part in parts] == [2, 4, 5]
    for branch in whole:
        close(found[branch], whole[branch])
    with pytest.raises(
        SweepTooLarge, match=r"one branch of 2 × 11 tokens .* may be used, .* are free"
    ):
        sweep(sweeper, model, number, BRANCHES, memory=one - 1)
    grid = trace(tracer, model, prompts(1), prompts(1) * 2 % VOCAB_SIZE, memory=one)[0]
    assert grid.cost.batches > 10


def test_a_trace_leaves_room_for_the_hidden_states_that_it_keeps(
    keeping: Keeping, tracer: Tracer
) -> None:
    model = served("Bloom")
    width = model.stepper.model.config.hidden_size
    kept = (model.info.num_layers + 1) * 2 * 11 * width * 4
    free = kept + 2 * batches._row_nbytes(model, 11)
    both = prompts(1), prompts(1) * 2 % VOCAB_SIZE
    keeping.device.free_nbytes = lambda: free
    assert trace(tracer, model, *both)[0].cost.batches > 10
    keeping.device.free_nbytes = lambda: free - 2
    with pytest.raises(SweepTooLarge, match="one branch .* of hidden states: .* may be used"):
        trace(tracer, model, *both)


def test_a_trace_of_one_prompt_with_itself_runs_nothing_twice(tracer: Tracer) -> None:
    model = served("Llama")
    job, found, _ = trace(tracer, model, prompts(1), prompts(1))
    assert (job.unchanged, job.cost.batches) == (44, 0)
    assert job.cost.layers == 2 * 3  # both prompts, once
    close(found[17], model.stepper.plain(prompts(1))[:, -1])


def test_top_and_tokens_are_what_the_logits_say(runner: Runner, sweeper: Sweeper) -> None:
    model = served("Llama")
    number = stopped(runner, model, 1)
    _, found, _ = sweep(sweeper, model, number, BRANCHES)
    results = sweeps.Results("top", 3, (7, 50))
    asked = sweeps.Sweep(number, BRANCHES, results, 0)
    _, turns = sweeper.sweep(asked, (), MINE, model, Stopwatch(), shared=False)
    (part,) = [one for one in turns if one is not None]
    out = part.meta.outcomes
    assert out.logits is None
    logits = torch.stack([found[branch] for branch in range(5)])
    np.testing.assert_array_equal(array(out.tokens, part.buffers), logits[..., [7, 50]])
    np.testing.assert_array_equal(array(out.top_values, part.buffers), logits.topk(3).values)
    norms = logits.double().logsumexp(-1)
    np.testing.assert_allclose(array(out.log_norm, part.buffers), norms, rtol=1e-12)


def test_what_cannot_be_swept_is_refused_before_anything_runs(
    runner: Runner, sweeper: Sweeper, tracer: Tracer
) -> None:
    model = served("Llama")
    number = stopped(runner, model, 1)
    bad = (BRANCHES[1], (wire.Zero((wire.Pick(5),)),))
    ids = prompts(1)
    for call, kind, words in (
        (lambda: sweep(sweeper, model, number, bad), EditError, "branch 1: edit 0 .Zero.: index 5"),
        (lambda: sweep(sweeper, model, number, ((wire.Skip(2),),)), EditError, "a Skip in a sweep"),
        (lambda: sweep(sweeper, model, number, ()), RequestError, "no branches"),
        (
            lambda: sweep(sweeper, model, stopped(runner, model, "norm"), BRANCHES),
            RequestError,
            "at norm, outside of the layers",
        ),
        (lambda: trace(tracer, model, ids, ids[:, :9]), PromptError, "11 tokens, .* one 9"),
        (lambda: trace(tracer, model, prompts(2), ids), PromptError, "2 prompts"),
        (lambda: trace(tracer, model, ids, ids, layers=(4,)), RequestError, "layer 4 does not"),
        (lambda: trace(tracer, model, ids, ids, positions=((),)), RequestError, "no positions"),
        (lambda: trace(tracer, model, ids, ids, positions=((11,),)), RequestError, "position 11"),
        (
            lambda: sweep(sweeper, model, number, BRANCHES, results=sweeps.Results("all", 0, ())),
            RequestError,
            'logits "all" of a sweep',
        ),
        (
            lambda: sweep(
                sweeper, model, number, BRANCHES, results=sweeps.Results("none", 0, (99,))
            ),
            RequestError,
            "token 99",
        ),
    ):
        with pytest.raises(kind, match=words):
            call()
