"""Stops inside layers, on many architectures: a zero edit changes no bit, an edit does what a hook in
the plain model does, and only the layer concerned runs again.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.jobs.job import EngineSession, Job
from djinn_zmq.engine.jobs.plans import Planner
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.places import BEFORE, Atlas
from djinn_zmq.engine.models.stepping import Stepper, same_bits
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import LayerError, StopError
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire.messages import ModelInfo, Resume, Run, Wanted
from djinn_zmq.wire.stops import Break, HasNaN, Norm, Step, Stops
from djinn_zmq.wire.tensors import inline
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model

# Tuples (GPT-J, GPT-Neo, Bloom, Falcon), flattened positions (OPT), experts, soft-capping, windows,
# convolutions, fused projections, parallel attention and MLP.
NAMES = [
    "Llama", "Mistral", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3Text", "Phi", "Phi3", "Olmo2", "GPTNeoX",
    "GPT2", "GPTJ", "GPTNeo", "GPTBigCode", "OPT", "Bloom", "Falcon", "Cohere2", "Mixtral", "GptOss",
    "Lfm2", "Glm4",
]  # fmt: skip
MINE = EngineSession(1, "me", "it")
HALF, NOTHING = wire.Scale(0.5, ()), wire.Scale(1.0, ())


@cache
def served(name: str) -> tuple[ServedModel, Any]:
    """A served model, and the same untouched."""
    model = tiny_model(name)
    untouched = copy.deepcopy(model)
    stepper = Stepper(model)
    cpu = torch.device("cpu")
    stepper.check(VOCAB_SIZE, cpu)
    info = ModelInfo(
        name, "", name, stepper.num_layers, 32, VOCAB_SIZE, 64, 0, 0, "float32", "cpu", False, ""
    )
    return ServedModel(info, stepper, None, cpu), untouched


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Any:
    yield
    served.cache_clear()


@pytest.fixture
def runner(keeping: Keeping) -> Runner:
    return Runner(keeping)


def done(made: tuple[Job, Any]) -> Job:
    job, turns = made
    for _ in turns:
        pass
    return job


def run(runner: Runner, model: ServedModel, stop: Any = None, **more: Any) -> Job:
    """stop: a path, Breaks, or a number."""
    asked = Run((), inline(prompts(2).numpy()), wanted(stop, more.pop("saves", ())), **more)
    return done(runner.begin(asked, (), MINE, model, Stopwatch(), shared=False))


def resume(
    runner: Runner, model: ServedModel, number: int, *edits: wire.Edit, stop: Any = None
) -> Job:
    asked = Resume(number, None, edits, wanted(stop))
    return done(runner.resume(asked, (), MINE, model, Stopwatch(), shared=False))


def wanted(stop: Any, saves: tuple[str, ...] = ()) -> Wanted:
    if isinstance(stop, str):
        stop = (Break(stop, ()),)
    if isinstance(stop, tuple) or saves:
        stop = Stops(stop or (), saves)
    return Wanted(stop, (), "all", 0)


def hooked(model: Any, atlas: Atlas, stepper: Stepper, path: str, change: Callable) -> Any:
    """The untouched model's logits with *change* made at *path*, by a hook written by hand."""
    (place,) = atlas.find(path)
    names = {id(module): name for name, module in stepper.model.named_modules()}
    module = model.get_submodule(names[id(place.module)])

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: change(kwargs[first])}

    def after(_: Any, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    hook = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if place.side == "input"
        else module.register_forward_hook(after)
    )
    logits = model(input_ids=prompts(2), use_cache=False).logits
    hook.remove()
    return logits


def half(value: Any) -> Any:
    """With its strides: the next kernel may round otherwise for others."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value * 0.5)


def paths_of(atlas: Atlas) -> list[str]:
    """Both sides of all that layer 1 consists of, its heads, and what is outside of the layers."""
    found = []
    for name in [*(f"layers.1.{part}" for part in atlas._names_in(1)), "embedding", "norm", "head"]:
        for path in (name, f"{name}.input", f"{name}.heads"):
            try:
                found += [path for _ in atlas.find(path)]
            except StopError:
                continue
    return found


@pytest.mark.parametrize("name", NAMES)
def test_at_every_place_a_zero_edit_changes_no_bit_and_an_edit_is_what_a_hook_does(
    name: str, runner: Runner
) -> None:
    model, untouched = served(name)
    atlas = Planner().atlas(model)
    paths = paths_of(atlas)
    kinds = {path.rpartition(".")[2] for path in paths}
    assert {"embedding", "norm", "head", "input"} <= kinds
    assert len(paths) > 10 and ("heads" in kinds or name == "Lfm2")
    plain = untouched(input_ids=prompts(2), use_cache=False).logits
    for path in paths:
        stopped = run(runner, model, path)
        assert stopped.state == "stopped" and stopped.logits is None
        point = stopped.kept[-1]
        assert point.place == path
        again = resume(runner, model, point.id, NOTHING)
        assert same_bits(again.logits, plain), path
        halved = resume(runner, model, point.id, HALF)
        by_hand = hooked(untouched, atlas, model.stepper, path, half)
        assert same_bits(halved.logits, by_hand), path
        runner.loans.discard(stopped)
    assert same_bits(run(runner, model).logits, plain)  # no hook stayed behind


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTJ", "Falcon", "Gemma2", "GPTNeo"])
def test_a_head_is_one_part_of_what_flows_into_the_output_projection(
    name: str, runner: Runner
) -> None:
    model, untouched = served(name)
    atlas = Planner().atlas(model)
    path = next(path for path in paths_of(atlas) if path.endswith(".heads"))
    point = run(runner, model, path).kept[-1]
    assert point.tensor.shape == (2, 11, 4, 8)

    def without_head_2(value: Any) -> Any:
        value = value.clone()
        value[1, :, 16:24] = 0
        return value

    at = (wire.Pick(1), wire.Stretch(None, None, None), wire.Pick(2))
    zeroed = resume(runner, model, point.id, wire.Zero(at))
    by_hand = hooked(untouched, atlas, model.stepper, path, without_head_2)
    assert same_bits(zeroed.logits, by_hand)


@pytest.fixture
def llama() -> ServedModel:
    return served("Llama")[0]


def test_only_the_layer_concerned_runs_again(
    runner: Runner, llama: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = run(runner, llama, "layers.1.mlp").kept[-1]
    stepped: list[int] = []
    own = Stepper.step

    def counted(self: Stepper, index: int, *rest: Any) -> Any:
        stepped.append(index)
        return own(self, index, *rest)

    monkeypatch.setattr(Stepper, "step", counted)
    resume(runner, llama, point.id, HALF)
    assert stepped == [1, 2]
    stepped.clear()
    again = resume(runner, llama, point.id, HALF, stop="layers.1.mlp")
    assert stepped == [1] and again.kept[-1].place == "layers.1.mlp"


def test_a_branch_stops_again_further_on_in_the_same_layer(
    runner: Runner, llama: ServedModel
) -> None:
    plain = run(runner, llama).logits
    first = run(runner, llama, "layers.1.self_attn").kept[-1]
    second = resume(runner, llama, first.id, stop="layers.1.mlp.input").kept[-1]
    assert same_bits(resume(runner, llama, second.id).logits, plain)
    with pytest.raises(LayerError, match=r"stop_at layers.1.self_attn lies behind the checkpoint"):
        resume(runner, llama, second.id, stop="layers.1.self_attn")
    with pytest.raises(
        LayerError, match="stop_at 1 lies behind the checkpoint at layers.1.mlp.inp"
    ):
        resume(runner, llama, second.id, stop=1)


def test_the_same_breakpoints_serve_one_resume_after_another(
    runner: Runner, llama: ServedModel
) -> None:
    stops = (Break("norm", ()), Break(".mlp", ()), Break(2, ()))
    job, seen = run(runner, llama, stops), []
    while job.stopped:
        seen.append(job.kept[-1].place or job.kept[-1].layer)
        job = resume(runner, llama, job.kept[-1].id, stop=stops)
    assert seen == ["layers.0.mlp", "layers.1.mlp", 2, "layers.2.mlp", "norm"]
    assert same_bits(job.logits, run(runner, llama).logits)


def test_places_are_saved_on_the_way_and_the_run_goes_on(
    runner: Runner, llama: ServedModel
) -> None:
    job = run(runner, llama, saves=(".mlp", "embedding", "layers.1.self_attn.heads", "norm"))
    assert job.state == "finished"
    assert [kept.place for kept in job.kept if kept.place] == [
        "embedding",
        "layers.0.mlp",
        "layers.1.self_attn.heads",
        "layers.1.mlp",
        "layers.2.mlp",
        "norm",
    ]
    for kept in job.kept:
        assert same_bits(resume(runner, llama, kept.id).logits, job.logits)


def test_a_condition_stops_where_it_first_holds_and_not_before(
    runner: Runner, llama: ServedModel, keeping: Keeping
) -> None:
    saved = run(runner, llama, saves=(".mlp",))
    norms = [
        torch.linalg.vector_norm(keeping.load(kept.tensor).double(), dim=-1).max().item()
        for kept in saved.kept
        if kept.place
    ]
    limit = sorted(norms)[-2] + 1e-6
    largest = norms.index(max(norms))
    job = run(runner, llama, (Break(".mlp", ((Norm(">", limit),),)),))
    assert [kept.place for kept in job.kept if kept.place] == [f"layers.{largest}.mlp"]
    assert len(job.kept) == 2  # it and its layer's input: what did not stop kept nothing
    assert run(runner, llama, (Break(".mlp", ((Norm(">", max(norms) + 1),),)),)).state == "finished"
    assert run(runner, llama, (Break(1, ((Step(0),),)),)).layer == 1


def test_the_first_layer_with_nan_is_found(runner: Runner, llama: ServedModel) -> None:
    point = run(runner, llama, 1).kept[-1]
    nowhere = resume(runner, llama, point.id, stop=(Break("", ((HasNaN(),),)),))
    assert nowhere.state == "finished"
    lost = wire.Scale(float("nan"), (wire.Pick(0), wire.Pick(3)))
    found = resume(runner, llama, point.id, lost, stop=(Break("", ((HasNaN(),),)),))
    assert (found.state, found.layer) == ("stopped", 2)


def test_a_skipped_layer_hands_on_what_flows_into_it(
    runner: Runner, llama: ServedModel, keeping: Keeping
) -> None:
    point = run(runner, llama, 1).kept[-1]
    skipped = resume(runner, llama, point.id, wire.Skip(2), stop=2).kept[-1]
    assert same_bits(keeping.load(skipped.tensor), keeping.load(point.tensor))
    # As if the model had no such layer: what flows into layer 2 flows into layer 3.
    stepper, ids = llama.stepper, prompts(2)
    recording = stepper.record(ids)
    hidden = stepper.step(0, recording.embedded.clone(), recording)
    expected = stepper.tail(ids, stepper.step(2, hidden, recording))
    for edits in ((wire.Skip(2),), (wire.Skip("layers.1"),)):
        assert same_bits(run(runner, llama, edits=edits).logits, expected)
    assert same_bits(resume(runner, llama, point.id, wire.Skip(2)).logits, expected)


def test_edits_of_a_fresh_run_are_made_before_the_first_layer(
    runner: Runner, llama: ServedModel
) -> None:
    point = run(runner, llama, 0).kept[-1]
    expected = resume(runner, llama, point.id, HALF).logits
    assert same_bits(run(runner, llama, edits=(HALF,)).logits, expected)


def test_what_is_never_reached_is_refused_before_anything_runs(
    runner: Runner, llama: ServedModel
) -> None:
    point = run(runner, llama, 2).kept[-1]
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: run(runner, llama, "layers.1.mpl"), StopError, "did you mean mlp"),
        (lambda: run(runner, llama, "layers.3.mlp"), StopError, "has layers.0 to layers.2"),
        (lambda: run(runner, llama, ".attn"), StopError, "self_attn"),
        (lambda: run(runner, llama, "layers.1.mlp.heads"), StopError, "LlamaMLP has no attention"),
        (lambda: run(runner, llama, "embedding.input"), StopError, "torch.int64, no activation"),
        (
            lambda: run(runner, llama, "nothing"),
            StopError,
            "outside of its layers it has embedding",
        ),
        (lambda: run(runner, llama, (Break("", ()),)), StopError, "neither a place nor"),
        (
            lambda: run(runner, llama, (Break(9, ((HasNaN(),),)),)),
            LayerError,
            "layer 9 does not exist",
        ),
        (lambda: resume(runner, llama, point.id, stop="embedding"), LayerError, "lies behind"),
        (lambda: resume(runner, llama, point.id, wire.Skip(2)), LayerError, "lies behind the chec"),
        (lambda: run(runner, llama, edits=(wire.Skip(4),)), LayerError, "has layers 1 to 3"),
        (lambda: run(runner, llama, 1, edits=(wire.Skip(2),)), LayerError, "never reached"),
        (
            lambda: run(runner, llama, "layers.1.mlp", edits=(wire.Skip(2),)),
            StopError,
            "its layer is skipped",
        ),
        (
            lambda: run(runner, llama, (Break(1, ()),), saves=("layers.1.mlp",)),
            LayerError,
            "save_at layers.1.mlp lies behind stop_at",
        ),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()


def test_the_atlas_tells_zones_apart_and_knows_the_model_by_its_own_names() -> None:
    model, _ = served("GPT2")
    atlas = Planner().atlas(model)
    assert [place.zone for path in ("embedding", "wpe", "ln_f", "head") for place in atlas.find(path)] == [BEFORE, BEFORE, 3, 3]  # fmt: skip
    (one,), (other,) = atlas.find("transformer.h.1.attn"), atlas.find("layers.1.attn")
    assert one == other and one.path == "layers.1.attn"
    assert atlas.find("h.2") == [3] and atlas.find("layers.2.input") == [2]
    assert [place.path for place in atlas.find(".mlp.act")] == [
        f"layers.{index}.mlp.act" for index in range(3)
    ]


def test_a_module_that_is_called_twice_is_no_place() -> None:
    model, _ = served("Phi")
    with pytest.raises(StopError, match="is called 2 times: which is meant is not clear"):
        Planner().atlas(model).find("layers.1.resid_dropout")
