"""Runs and resumes as the loop makes them: what they keep, what they refuse, what their replies carry."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")

from djinn_zmq.client.indexing import index_of
from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.jobs import replies
from djinn_zmq.engine.jobs.job import EngineSession, Job
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.loading import ServedModel, load
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.errors import (
    ArenaFull,
    EditError,
    LayerError,
    ProtocolError,
    RequestError,
    StaleSlot,
    UnknownCheckpoint,
)
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import edits as wire
from djinn_zmq.wire.messages import Load, Resume, Run, Wanted
from djinn_zmq.wire.tensors import Inline, Tensor, inline, over, view
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model
from tests.engine.keepers import OWNER, Late, ServerSide, running

CPU = torch.device("cpu")
MINE, YOURS = EngineSession(1, "me", "it"), EngineSession(2, "you", "it")
NO_EDITS: tuple[wire.Edit, ...] = ()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = tmp_path_factory.mktemp("gemma2")
    tiny_model("Gemma2", torch.bfloat16).save_pretrained(path)
    return load(Load("it", str(path), "auto"), Cpu(), lambda *_: None)


@pytest.fixture
def runner(keeping: Keeping) -> Runner:
    return Runner(keeping)


def wanted(
    stop_at: int | None = None, save_at: tuple[int, ...] = (), logits: str = "all", top: int = 0
) -> Wanted:
    return Wanted(stop_at, save_at, logits, top)


def run(
    runner: Runner, model: ServedModel, ids: torch.Tensor, want: Wanted, *, shared: bool = False
) -> Job:
    asked = Run((), inline(ids.numpy()), want)
    job, turns = runner.begin(asked, (), MINE, model, Stopwatch(), shared=shared)
    for _ in turns:
        pass
    return job


def resume(
    runner: Runner,
    model: ServedModel,
    checkpoint: int,
    want: Wanted,
    *,
    edits: tuple[wire.Edit, ...] = NO_EDITS,
    hidden: Tensor | None = None,
    session: EngineSession = MINE,
) -> Job:
    asked = Resume(checkpoint, hidden, edits, want)
    job, turns = runner.resume(asked, (), session, model, Stopwatch(), shared=False)
    for _ in turns:
        pass
    return job


def read(tensor: Tensor | None, buffers: Any) -> np.ndarray:
    assert tensor is not None
    return np.array(view(tensor, buffers))


# ---- the work


def test_a_run_gives_the_models_own_logits(runner: Runner, model: ServedModel) -> None:
    ids = prompts(3)
    job = run(runner, model, ids, wanted())
    assert (str(job.state), job.layer, job.kept) == ("finished", 4, [])
    assert job.logits is not None and same_bits(job.logits, model.stepper.plain(ids))


def test_a_run_gives_others_their_turn_after_every_layer(
    runner: Runner, model: ServedModel
) -> None:
    asked = Run((), inline(prompts(1).numpy()), wanted())
    job, turns = runner.begin(asked, (), MINE, model, Stopwatch(), shared=False)
    assert str(job.state) == "queued"
    assert [job.layer for _ in turns] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["hidden", "an edit"])
@pytest.mark.parametrize("stop_at", [None, 3, 2])
def test_what_was_sent_and_is_released_before_the_answer_comes_to_an_error_and_keeps_nothing(
    server: ServerSide, model: ServedModel, how: str, stop_at: int | None
) -> None:
    """Its owner may have put something else there by then."""
    device, staging = Late(), server.arenas.staging(OWNER)
    with running(server, device) as keeping:
        runner = Runner(keeping)
        (point,) = run(runner, model, prompts(2), wanted(2, logits="none")).kept
        device.finish()
        keeping.tiers.fill()
        for released in (False, True):
            slot = server.foreign(bytes(point.tensor.nbytes))
            sent = Tensor("bfloat16", point.tensor.shape, slot)
            hidden, edits = (sent, ()) if how == "hidden" else (None, (wire.Set(sent, ()),))
            asked = Resume(point.id, hidden, edits, wanted(stop_at, (2,)))
            device.busy = True
            job, turns = runner.resume(asked, (), MINE, model, Stopwatch(), shared=False)
            next(turns)
            device.busy = False
            if not released:
                assert list(turns) is not None and job.state in ("stopped", "finished")
                keeping.drop([kept.id for kept in job.kept])
                continue
            staging.give_back(slot)
            assert server.foreign(b"another's") == replace(slot, generation=slot.generation + 2)
            with pytest.raises(StaleSlot, match="what was sent was released before it was answere"):
                list(turns)
            runner.loans.discard(job)
        device.finish()
        assert list(keeping.entries) == [point.id]


@pytest.mark.parametrize("layer", range(5))
def test_a_stopped_run_is_resumed_to_the_same_bits_any_number_of_times(
    runner: Runner, model: ServedModel, layer: int
) -> None:
    ids = prompts(2)
    stopped = run(runner, model, ids, wanted(stop_at=layer))
    assert (str(stopped.state), stopped.layer, stopped.logits) == ("stopped", layer, None)
    (kept,) = stopped.kept
    assert (kept.layer, kept.tensor.shape, kept.tensor.dtype) == (layer, (2, 11, 32), "bfloat16")
    for _ in range(2):
        job = resume(runner, model, kept.id, wanted())
        assert job.logits is not None and same_bits(job.logits, model.stepper.plain(ids))


def test_checkpoints_on_the_way_are_those_of_separate_stops(
    runner: Runner, keeping: Keeping, model: ServedModel
) -> None:
    ids = prompts(2)
    whole = run(runner, model, ids, wanted(save_at=(0, 2, 4)))
    assert [kept.layer for kept in whole.kept] == [0, 2, 4]
    for kept in whole.kept:
        (alone,) = run(runner, model, ids, wanted(stop_at=kept.layer)).kept
        assert same_bits(keeping.load(kept.tensor), keeping.load(alone.tensor))


def test_a_resume_with_edits_leaves_its_checkpoint_as_it_was(
    runner: Runner, keeping: Keeping, model: ServedModel
) -> None:
    ids = prompts(2)
    (kept,) = run(runner, model, ids, wanted(stop_at=2)).kept
    before = keeping.load(kept.tensor)
    edit = wire.Scale(3.0, index_of((0, -1)))
    changed = resume(runner, model, kept.id, wanted(), edits=(edit,)).logits
    plain = model.stepper.plain(ids)
    assert changed is not None
    assert same_bits(changed[1], plain[1]) and not same_bits(changed[0, -1], plain[0, -1])
    assert same_bits(changed[0, :-1], plain[0, :-1]), "earlier positions do not see a later one"
    assert same_bits(keeping.load(kept.tensor), before)


def test_a_hidden_state_in_a_checkpoints_place_is_taken_outright(
    runner: Runner, keeping: Keeping, model: ServedModel
) -> None:
    (mine,) = run(runner, model, prompts(2), wanted(stop_at=2)).kept
    (other,) = run(runner, model, prompts(2).flip(0), wanted(stop_at=2)).kept
    raw = keeping.load(other.tensor).view(torch.uint8).numpy().tobytes()
    hidden = Tensor("bfloat16", other.tensor.shape, Inline(raw))
    job = resume(runner, model, mine.id, wanted(), hidden=hidden)
    assert job.logits is not None
    assert same_bits(job.logits, model.stepper.plain(prompts(2).flip(0)))


def test_a_patch_from_another_checkpoint_is_as_if_it_were_its_own(
    runner: Runner, model: ServedModel
) -> None:
    (mine,) = run(runner, model, prompts(1), wanted(stop_at=2)).kept
    (other,) = run(runner, model, prompts(1).flip(1), wanted(stop_at=2)).kept
    patch = wire.Patch(other.id, index_of(...), index_of(...))
    job = resume(runner, model, mine.id, wanted(), edits=(patch,))
    assert job.logits is not None
    assert same_bits(job.logits, model.stepper.plain(prompts(1).flip(1)))


def test_a_run_that_finds_no_room_gives_back_what_it_kept(
    runner: Runner, keeping: Keeping, model: ServedModel
) -> None:
    asked = Run((), inline(prompts(8, length=64).numpy()), wanted(save_at=(0, 1, 2, 3, 4)))
    job, turns = runner.begin(asked, (), MINE, model, Stopwatch(), shared=False)
    with pytest.raises(ArenaFull):
        for _ in range(20):
            next(turns)
    assert job.kept and keeping.pool.used
    runner.loans.discard(job)
    assert (job.kept, keeping.entries, keeping.pool.used) == ([], {}, 0)


# ---- what is refused


@pytest.mark.parametrize(
    ("want", "error", "text"),
    [
        (wanted(stop_at=5), LayerError, r'layer 5 does not exist: "it" has 4 layers \(0-4\)'),
        (wanted(stop_at=-1), LayerError, "layer -1 does not exist"),
        (wanted(save_at=(1, 9)), LayerError, "layer 9 does not exist"),
        (wanted(stop_at=2, save_at=(3,)), LayerError, "save_at 3 lies behind stop_at 2"),
        (wanted(logits="some"), RequestError, 'logits "some"'),
        (wanted(logits="top", top=0), RequestError, "the top 0 logits: 1 to 99"),
        (wanted(logits="top", top=100), RequestError, "the top 100 logits: 1 to 99"),
    ],
)
def test_what_cannot_be_wanted_is_refused_before_anything_is_done(
    runner: Runner,
    keeping: Keeping,
    model: ServedModel,
    want: Wanted,
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        run(runner, model, prompts(1), want)
    assert not keeping.entries


@pytest.mark.parametrize("want", [wanted(stop_at=1), wanted(save_at=(1,))])
def test_a_layer_behind_the_checkpoint_is_refused(
    runner: Runner, model: ServedModel, want: Wanted
) -> None:
    (kept,) = run(runner, model, prompts(1), wanted(stop_at=2)).kept
    with pytest.raises(LayerError, match="1 lies behind the checkpoint at layer 2"):
        resume(runner, model, kept.id, want)


def test_ids_of_another_dtype_are_refused(runner: Runner, model: ServedModel) -> None:
    asked = Run((), inline(np.ones((1, 4), np.int32)), wanted())
    with pytest.raises(ProtocolError, match="token ids of dtype int32: int64"):
        runner.begin(asked, (), MINE, model, Stopwatch(), shared=False)


def test_somebody_elses_checkpoint_is_neither_resumed_nor_patched_from(
    runner: Runner, model: ServedModel
) -> None:
    (kept,) = run(runner, model, prompts(1), wanted(stop_at=2)).kept
    with pytest.raises(UnknownCheckpoint):
        resume(runner, model, kept.id, wanted(), session=YOURS)
    also_mine = EngineSession(3, "me", "it")
    with pytest.raises(RequestError, match="only a checkpoint of this session's own model"):
        resume(runner, model, kept.id, wanted(), session=also_mine)


def test_kept_logits_are_no_checkpoint(runner: Runner, model: ServedModel) -> None:
    job = run(runner, model, prompts(1), wanted(stop_at=2))
    logits = runner.loans.keep(job, torch.zeros(1, 99), -1)
    with pytest.raises(RequestError):
        resume(runner, model, logits.id, wanted())
    patch = wire.Patch(logits.id, index_of(...), index_of(...))
    with pytest.raises(EditError, match="is not a checkpoint"):
        resume(runner, model, job.kept[0].id, wanted(), edits=(patch,))


def test_a_hidden_state_of_another_shape_or_dtype_is_refused(
    runner: Runner, model: ServedModel
) -> None:
    (kept,) = run(runner, model, prompts(1), wanted(stop_at=2)).kept
    for array, text in [
        (np.zeros((1, 10, 32), np.float16), r"hidden has shape \(1, 10, 32\)"),
        (np.zeros((1, 11, 32), np.float16), "hidden is float16, the checkpoint bfloat16"),
    ]:
        with pytest.raises(EditError, match=text):
            resume(runner, model, kept.id, wanted(), hidden=inline(array))


# ---- replies


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("which", ["all", "last"])
def test_a_reply_carries_the_logits_asked_for(
    runner: Runner, keeping: Keeping, model: ServedModel, which: str, shared: bool
) -> None:
    ids = prompts(6, length=64)  # all logits: 76 KB
    job = run(runner, model, ids, wanted(logits=which), shared=shared)
    meta, buffers = replies.of_run(job)
    assert (read(meta.ids, buffers) == ids.numpy()).all()
    plain = model.stepper.plain(ids)
    expected = plain if which == "all" else plain[:, -1]
    assert meta.logits is not None and meta.logits.shape == tuple(expected.shape)
    assert bool(meta.logits_id) == (shared and which == "all")
    if meta.logits_id:
        assert keeping.find(meta.logits_id, "me").kept.layer == -1
    assert same_bits(keeping.load(meta.logits, buffers), expected)
    assert meta.spans[0][0] == "queue"


def test_no_logits_are_computed_where_none_are_wanted(runner: Runner, model: ServedModel) -> None:
    job = run(runner, model, prompts(1), wanted(logits="none"))
    meta, _ = replies.of_run(job)
    assert (meta.state, meta.layer, meta.logits, meta.logits_id) == ("finished", 4, None, 0)


@pytest.mark.parametrize("count", [1, 7, VOCAB_SIZE])
def test_the_top_logits_are_those_a_client_would_find_in_all(
    runner: Runner, model: ServedModel, count: int
) -> None:
    ids = prompts(3)
    job = run(runner, model, ids, wanted(logits="top", top=count))
    assert job.logits is not None
    job.logits.copy_((job.logits * 2).round() / 2)  # so that many are equal
    meta, buffers = replies.of_run(job)
    raw = job.logits.contiguous().view(torch.uint8).numpy().tobytes()
    logits = over(raw, "bfloat16", (3, VOCAB_SIZE)).astype(np.float64)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(read(meta.top_ids, buffers), expected)
    values = read(meta.top_values, buffers).astype(np.float64)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, -1))
    norm = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(read(meta.top_log_norm, buffers), norm, rtol=1e-12)


def test_logits_that_are_not_numbers_have_a_top_too(runner: Runner, model: ServedModel) -> None:
    job = run(runner, model, prompts(2), wanted(logits="top", top=3))
    assert job.logits is not None
    job.logits[0] = torch.nan
    meta, buffers = replies.of_run(job)
    assert read(meta.top_ids, buffers).shape == (2, 3)


def test_more_top_logits_than_a_message_carries_are_refused(
    runner: Runner, model: ServedModel
) -> None:
    ids = np.zeros((1500, 1), np.int64)
    asked = Run((), Tensor("int64", ids.shape, Inline(ids.tobytes())), wanted(logits="top", top=88))
    with pytest.raises(RequestError, match="the top 88 logits of 1500 prompts: at most 87 of each"):
        runner.begin(asked, (), MINE, model, Stopwatch(), shared=False)
