"""Stops at any place and on conditions, through real processes."""

import asyncio
import gc

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import Break, HasNaN, Norm, Scale, Skip, Step, Token, Zero, aio
from djinn_zmq.errors import EditError, LayerError, RequestError, StopError, UnknownCheckpoint
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
PLACES = [
    "embedding", "layers.0.self_attn.heads", "layers.1.input_layernorm", "layers.1.mlp",
    "layers.2.self_attn.input", "layers.3.mlp.down_proj.input", "norm.input", "norm", "head",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(served):
    with served.connect() as server:
        yield server.model("tiny")


@pytest.fixture(scope="module")
def plain(model):
    return model.run(FRANCE, logits="all").logits.tobytes()


@pytest.mark.parametrize("place", PLACES)
def test_a_zero_edit_at_any_place_changes_no_bit_and_a_real_one_does(model, plain, place):
    run = model.run(FRANCE, stop_at=place)
    point = run.checkpoint
    assert (run.state, point.place) == ("stopped", place) and place in repr(point)
    assert repr(run).startswith(f"<run stopped at {place}, ")
    whole = np.asarray(point.hidden)
    for nothing in ([], [Scale(1.0)], [djinn.Set(whole)]):
        assert point.resume(nothing, logits="all").logits.tobytes() == plain
    assert point.resume(hidden=whole, logits="all").logits.tobytes() == plain
    assert point.resume([Zero()], logits="all").logits.tobytes() != plain
    assert point.resume(logits="all").logits.tobytes() == plain  # the checkpoint is untouched


@pytest.mark.parametrize("positions", [1, 3, 4, 5, 16])  # the model has 4 heads of 16
def test_a_head_is_zeroed_by_its_number(model, positions):
    ids = np.arange(5, 5 + positions)
    point = model.run(ids, stop_at="layers.2.self_attn.heads").checkpoint
    assert point.shape == (1, positions, 4, 16)
    flat = model.run(ids, stop_at="layers.2.self_attn.o_proj.input").checkpoint
    assert np.asarray(flat.hidden).tobytes() == np.asarray(point.hidden).tobytes()
    edited = model.run(ids, stop_at="layers.2.self_attn.heads").checkpoint.resume(
        Zero(at=(0, -1, 3)), save_at="layers.2.mlp"
    )
    by_columns = flat.resume(Zero(at=(0, -1, slice(48, 64)))).logits.tobytes()
    assert edited.logits.tobytes() == by_columns != point.resume().logits.tobytes()
    assert edited.checkpoint.resume().logits.tobytes() == by_columns  # which rests on the heads


@pytest.mark.parametrize("place", ["layers.1.mlp", "embedding", "norm"])
def test_a_place_that_is_asked_for_twice_is_kept_once(model, place):
    before = [] if place == "embedding" else [1]
    run = model.run(FRANCE, stop_at=place, save_at=[place, f"{place}.output", *before])
    assert [one.place or one.layer for one in run.checkpoint.history] == [*before, place]


def test_heads_and_what_they_are_told_apart_of_are_two_places(model):
    heads, flat = "layers.1.self_attn.heads", "layers.1.self_attn.o_proj.input"
    run = model.run(FRANCE, stop_at=heads, save_at=[flat, heads])
    assert sorted(one.place for one in run.checkpoint.history) == [heads, flat]


def test_edits_of_a_run_that_stops_before_what_they_are_of_are_refused(model):
    for edit in (djinn.Scale(0.0), Zero(at=(9, 9, 9))):
        with pytest.raises(EditError, match="this run stops before; edit when it is resumed"):
            model.run(FRANCE, stop_at="embedding", edits=edit)
    assert model.run(FRANCE, stop_at=0, edits=djinn.Scale(0.0)).checkpoint.norms().max() == 0


def test_an_mlp_is_patched_from_another_prompt(model):
    here = model.run(FRANCE, save_at=".mlp").checkpoints
    there = model.run(GERMANY, save_at=".mlp").checkpoints
    assert list(here) == [f"layers.{index}.mlp" for index in range(4)]
    early = here["layers.0.mlp"].resume(djinn.Patch(there["layers.0.mlp"], at=(0, 3)))
    assert early.logits.tobytes() != model.run(FRANCE).logits.tobytes()


def test_the_residual_before_and_after_a_layer_has_two_names(model):
    by_path = model.run(FRANCE, stop_at="layers.1", save_at="model.layers.1.input").checkpoints
    assert list(by_path) == [1, 2]
    by_number = model.run(FRANCE, save_at=[1, 2]).checkpoints
    assert all(by_path[layer].diff(by_number[layer]).same_bits for layer in (1, 2))


def test_the_same_breakpoints_walk_through_a_run(model, plain):
    stops = ["layers.1.mlp", 1, Break(".self_attn", when=Norm(">", 1e9)), 3]
    run, seen = model.run(FRANCE, stop_at=stops, logits="all"), []
    while run.stopped:
        seen.append(run.checkpoint.place or run.layer)
        run = run.checkpoint.resume(stop_at=stops, logits="all")
    assert seen == [1, "layers.1.mlp", 3] and run.logits.tobytes() == plain


def test_all_is_every_layer_that_the_run_comes_to(model):
    kept = lambda run: [one.place or one.layer for one in run.checkpoints.values()]
    for stop, there in (
        ("layers.1.mlp", [0, 1, "layers.1.mlp"]),
        (["layers.1.mlp", 3], [0, 1, "layers.1.mlp"]),
        (Break(2), [0, 1, 2]),
        (Break(2, when=HasNaN()), [0, 1, 2, 3, 4]),
        ("embedding", ["embedding"]),
        ("norm", [0, 1, 2, 3, 4, "norm"]),
        (2, [0, 1, 2]),
        (None, [0, 1, 2, 3, 4]),
    ):
        assert kept(model.run(FRANCE, stop_at=stop, save_at="all")) == there
    inside = model.run(FRANCE, stop_at="layers.1.mlp").checkpoint
    assert kept(inside.resume(save_at="all")) == [2, 3, 4]
    assert kept(inside.resume(save_at="all", stop_at=3)) == [2, 3]
    assert kept(model.run(FRANCE, stop_at="embedding").checkpoint.resume(save_at="all")) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert kept(model.run(FRANCE, stop_at="norm").checkpoint.resume(save_at="all")) == []
    assert kept(model.run(FRANCE, stop_at=2).checkpoint.resume(save_at="all", stop_at=".mlp")) == [
        2,
        "layers.2.mlp",
    ]
    with model.session() as session:
        generation = session.generate(
            FRANCE, 2, ends=(), save_at="all", stop_at="layers.3.mlp", steps=1
        ).finish()
        assert list(generation.checkpoints) == [0, 1, 2, 3, "layers.3.mlp"] and generation.step == 1


def test_conditions_are_evaluated_on_the_engine(model):
    whole = model.run(FRANCE, save_at="all")
    norms = {layer: float(point.norms().max()) for layer, point in whole.checkpoints.items()}
    for when, stops in (
        (HasNaN() | Norm(">", 50) | Token("is") | Step(3), True),
        (HasNaN(), False),
        (Norm(">", norms[2] + 1), False),
        (Norm(">=", norms[2] - 1) & Token("france") & Step(0), True),
        (Norm("<", 1e-3), False),
        (Token(model.encode("of")[0]), True),
    ):
        run = model.run(FRANCE, stop_at=Break(2, when=when))
        assert (run.state, run.layer) == (("stopped", 2) if stops else ("finished", 4)), when
    first = min(layer for layer, norm in norms.items() if norm >= norms[2])
    assert model.run(FRANCE, stop_at=Break(when=Norm(">=", norms[2] - 1e-3))).layer == first


def test_a_skipped_layer_is_left_out_of_that_run_alone(model, plain):
    skipped = model.run(FRANCE, edits=Skip(3), save_at=[2, 3], logits="all")
    assert skipped.checkpoints[2].diff(skipped.checkpoints[3]).same_bits
    assert skipped.logits.tobytes() != plain
    point = model.run(FRANCE, stop_at=1).checkpoint
    again = point.resume([Scale(1.0), Skip("layers.2")], logits="all")
    assert again.logits.tobytes() == skipped.logits.tobytes()
    assert point.resume(logits="all").logits.tobytes() == plain


def test_a_stop_inside_a_layer_gives_back_all_it_kept(model, served):
    with served.connect() as server:
        mine = server.model("tiny")
        gc.collect()
        model.ping()  # takes along what other tests have let go of
        before = server.status().memory.checkpoints
        run = mine.run(FRANCE, save_at=["layers.1.mlp", "layers.1.self_attn"])
        one, other = run.checkpoints.values()
        assert server.status().memory.checkpoints == before + 3  # and the layer's input, once
        one.release()
        assert other.resume().top(1)[0].token == "paris"
        with pytest.raises(UnknownCheckpoint):
            one.resume()
        del run, one, other
        gc.collect()
        mine.ping()  # takes along what is released, past the server
        until(lambda: server.status().memory.checkpoints == before, "all of it is given back")


def test_looks_at_what_is_inside_a_layer(model):
    run = model.run(FRANCE, save_at=["layers.1.mlp", "layers.1.self_attn.heads", 2])
    heads = run.checkpoints["layers.1.self_attn.heads"]
    whole = np.asarray(heads.hidden).astype(np.float64).reshape(1, 5, 64)
    np.testing.assert_allclose(heads.norms(), np.linalg.norm(whole, axis=-1), rtol=1e-6)
    assert run.lens(-1).layers == (2,)
    for look in (heads.top, heads.attention):
        with pytest.raises(RequestError, match="at layers.1.self_attn.heads: this look needs"):
            look()


def test_what_can_never_be_is_refused_and_the_session_goes_on(model, plain):
    point = model.run(FRANCE, stop_at="layers.2.mlp").checkpoint
    for call, kind, words in (
        (lambda: model.run(FRANCE, stop_at="layers.1.mpl"), StopError, "did you mean mlp"),
        (lambda: model.run(FRANCE, stop_at="layers.4"), StopError, r"layers\.0 to layers\.3"),
        (lambda: model.run(FRANCE, save_at="lm_hed"), StopError, "did you mean lm_head"),
        (lambda: model.run(FRANCE, stop_at=Break(9, HasNaN())), LayerError, "layer 9 does not"),
        (
            lambda: model.run(FRANCE, stop_at=Break(2, Token("qwertz"))),
            StopError,
            "no single token",
        ),
        (lambda: model.run(FRANCE, stop_at=Break(2, Token("paris"))), StopError, "holds no token"),
        (lambda: model.run(FRANCE, stop_at=Break(2, Token(999))), StopError, "ids 0 to 207"),
        (lambda: model.run(FRANCE, stop_at=Break(2, Norm("<", -1))), StopError, "not negative"),
        (lambda: model.run(FRANCE, stop_at=Break(2, Norm("=", 1))), StopError, "one of >, >="),
        (lambda: model.run(FRANCE, stop_at=Break(2, Step(3))), StopError, "a plain run is step 0"),
        (
            lambda: model.run(FRANCE, stop_at=Break(2, HasNaN() & Step(1))),
            StopError,
            "can never hold: there is no step 1",
        ),
        (lambda: point.resume(stop_at="layers.1.mlp"), LayerError, "lies behind the checkpoint at"),
        (lambda: point.resume(stop_at=2), LayerError, "lies behind the checkpoint at layers.2.mlp"),
        (lambda: point.resume(Skip(3)), LayerError, "lies behind"),
        (lambda: point.resume(Zero(at=(0, 9))), EditError, "out of range"),
        (lambda: Break(), StopError, "a place, a condition"),
        (lambda: Break(2, when="nan"), StopError, "use HasNaN"),
        (lambda: HasNaN() or Norm(">", 1), StopError, r"combine with \| and &"),
        (lambda: HasNaN() | 3, StopError, "3 is no condition"),
        (lambda: Norm(">", "x"), StopError, "and a number"),
        (lambda: Skip(1.5), EditError, "a number or a path"),
        (lambda: model.run(FRANCE, stop_at=[]), LayerError, "at least one place"),
        (lambda: model.run(FRANCE, stop_at=2.5), LayerError, "a layer is a whole number"),
    ):
        with pytest.raises(kind, match=words):
            call()
        assert point.resume(logits="all").logits.tobytes() == plain


def test_an_edit_earlier_in_the_same_layer_is_not_lost(model):
    edits = [Scale(3.0)]
    point = model.run(FRANCE, stop_at="layers.1.self_attn").checkpoint
    whole = point.resume(edits).logits.tobytes()
    for at in ("layers.1.post_attention_layernorm", "layers.1.mlp"):
        point = point.resume(
            edits if point.place.endswith("self_attn") else (), stop_at=at
        ).checkpoint
        assert point.resume().logits.tobytes() == whole
    (swept,) = point.sweep([[]])
    resumed = np.frombuffer(whole, swept.logits.dtype).astype(np.float32)
    assert np.allclose(np.asarray(swept.logits[0], np.float32), resumed, atol=0.1)


def test_stops_from_asyncio_code_and_over_tcp(served, plain):
    async def main() -> None:
        async with aio.connect(served.tcp) as server:
            model = await server.model("tiny")
            run = await model.run(FRANCE, stop_at=Break("layers.1.mlp", when=Token("france")))
            done = await run.checkpoint.resume([Scale(1.0)], logits="all")
            assert (await done.logits).tobytes() == plain

    asyncio.run(main())
