"""Stops inside of layers, looks, sweeps and traces on a GPU, against the plain model with hooks by hand: bit for
bit, or where many branches are the rows of one batch, within its rounding."""

import copy

import numpy as np
import pytest
import torch
import transformers

import djinn_zmq as djinn
from tests.gpu.plain import LAYERS, hands, raw, scaled, seen

pytestmark = pytest.mark.gpu

INSIDE = [
    "embedding", "layers.1.input_layernorm", "layers.1.self_attn.q_proj", "layers.1.self_attn.heads",
    "layers.1.self_attn", "layers.1.mlp.input", "layers.1.mlp.act_fn", "layers.1.mlp", "norm", "norm.input",
]  # fmt: skip
EDITS = [
    [],
    [djinn.Zero(at=(0, -1))],
    [djinn.Scale(0.5, at=(0, slice(None), slice(100)))],  # a norm undoes it where it is all
    [djinn.Add(np.linspace(-1, 1, 256, dtype=np.float32), at=(0, -1))],
]


@pytest.fixture
def brief(watched, watching):
    return watching.model(str(watched.source["brief"]))


@pytest.fixture
def exact(watched, watching):
    return watching.model(str(watched.source["exact"]))


def test_inside_of_a_layer_a_zero_edit_changes_no_bit_and_an_edit_is_what_a_hook_does(
    watched, brief
):
    ids = watched.ids(2, 300)
    given = {"input_ids": watched.on_device(ids), "use_cache": False}
    logits = raw(watched.brief(**given).logits)
    there = seen(watched.brief, INSIDE, lambda: watched.brief(**given))
    saved = brief.run(ids, save_at=INSIDE, logits="all")
    assert raw(saved.logits) == logits
    for at in INSIDE:
        point = saved.checkpoints[at]
        assert raw(point.hidden) == there[at], at
        assert raw(point.resume(djinn.Scale(1.0), logits="all").logits) == logits, at
        if at == "embedding":
            continue
        with hands(watched.brief, {at: scaled(0.5)}):
            halved = raw(watched.brief(**given).logits)
        assert raw(point.resume(djinn.Scale(0.5), logits="all").logits) == halved, at
    assert raw(brief.run(ids, logits="all").logits) == logits  # no hook stayed behind


def test_a_step_behind_a_past_stops_inside_of_a_layer_and_goes_on_with_the_plain_models_bits(
    watched, brief
):
    prompt, ids = watched.ids(1, 700), watched.ids(1, 3, seed=2)
    for at in ("layers.2.self_attn.heads", "layers.3.mlp"):
        cache = transformers.DynamicCache(config=watched.brief.config)
        watched.brief(watched.on_device(prompt), past_key_values=cache)
        with hands(watched.brief, {at: scaled(-1.0)}):
            out = watched.brief(watched.on_device(ids), past_key_values=cache)
        with brief.session() as session:
            session.run(prompt)
            point = session.run(ids, stop_at=at).checkpoint
            assert raw(point.resume(djinn.Scale(-1.0), logits="all").logits) == raw(out.logits)


def test_looks_say_what_the_plain_model_says(watched, brief):
    ids, plain = watched.ids(1, 700), watched.brief
    given = watched.on_device(ids)
    out = plain(given, use_cache=False, output_hidden_states=True)
    places = [*range(LAYERS), "layers.2.self_attn.heads"]
    run = brief.run(ids, save_at=[*range(LAYERS + 1), "layers.2.self_attn.heads"])
    for at in places:
        whole = np.asarray(run.checkpoints[at].hidden).astype(np.float64)
        lengths = np.linalg.norm(whole.reshape(1, 700, -1), axis=-1)
        np.testing.assert_allclose(run.checkpoints[at].norms(), lengths, rtol=1e-6)
    lens = run.lens([0, -1], k=3)
    for layer in range(LAYERS):
        tail = plain.lm_head(plain.model.norm(out.hidden_states[layer]))[0, [0, -1]]
        likeliest = tail.float().argmax(-1).tolist()
        assert lens.ids[layer, 0, :, 0].tolist() == likeliest
    last = run.checkpoints[LAYERS]
    assert last.diff(last.resume(stop_at=LAYERS).checkpoint).same_bits
    assert not last.diff(run.checkpoints[1]).same_bits
    logits = out.logits[0, -1].float()
    assert logits[last.top(1)[0].id].item() == logits.max().item()


@pytest.mark.parametrize(("name", "stop", "layer"), [("brief", 0, 1), ("exact", 2, LAYERS)])
@pytest.mark.parametrize("past", [0, 500])
def test_attention_is_the_plain_models_eager_one_also_behind_a_past(
    watched, watching, name, stop, layer, past
):
    prompt, ids = watched.ids(1, past), watched.ids(1, 200, seed=2)
    eager = copy.deepcopy(getattr(watched, name))
    eager.set_attn_implementation("eager")
    cache = transformers.DynamicCache(config=eager.config)
    with watching.model(str(watched.source[name])).session() as session:
        if past:
            eager(watched.on_device(prompt), past_key_values=cache)
            session.run(prompt)
        point = session.run(ids, stop_at=stop).checkpoint
        found = point.attention(layer)
    out = eager(watched.on_device(ids), past_key_values=cache, output_attentions=True)
    expected = out.attentions[layer - 1]
    assert found.shape == expected.shape == (1, 4, 200, past + 200)
    if layer == stop + 1:  # what flows into it is the same
        assert raw(found) == raw(expected)
    else:  # layers between were run with another attention
        np.testing.assert_allclose(found, expected.cpu().numpy(), atol=1e-4)


# ---- rows of a batch


def test_a_sweep_is_one_resume_a_branch(watched, exact):
    run = exact.run(watched.ids(1, 300), save_at=[0, 3, LAYERS, "layers.2.self_attn.heads"])
    heads = [[djinn.Zero(at=(0, -1, head))] for head in range(4)]
    for at, point in run.checkpoints.items():
        branches = heads if at == "layers.2.self_attn.heads" else EDITS
        swept(point, branches, 1e-4)


@pytest.mark.parametrize("static", [0, 1024])
@pytest.mark.parametrize("at", [3, "layers.2.mlp"])
@pytest.mark.parametrize("name", ["brief", "exact"])
def test_a_sweep_behind_a_long_past_is_one_resume_a_branch(watched, watching, name, at, static):
    plain, model = getattr(watched, name), watching.model(str(watched.source[name]))
    prompt, ids = watched.ids(1, 700), watched.ids(1, 3, seed=2)
    given = watched.on_device(ids)

    def last_logits(cache, count: int = 1):
        plain(watched.on_device(prompt), past_key_values=cache)
        if count > 1:
            cache.batch_repeat_interleave(count)
        return plain(given.repeat(count, 1), past_key_values=cache).logits[:, -1].float()

    limit = 1e-4
    if name == "brief":  # what the plain model's own batches differ by
        one, four = (last_logits(transformers.DynamicCache(config=plain.config), n) for n in (1, 4))
        limit = max(2.0**-6, 4 * ((four - one).abs().max() / one.abs().max()).item())
    if static:
        alone = last_logits(transformers.StaticCache(config=plain.config, max_cache_len=static))
    else:
        alone = last_logits(transformers.DynamicCache(config=plain.config))
    with model.session(static=static) as session:
        session.run(prompt)
        point = session.run(ids, stop_at=at).checkpoint
        found = swept(point, EDITS, limit)
        assert far(found[0], alone[0].cpu().numpy()) <= limit
        other = session.run(ids).logits  # the session is as it was
        assert other.shape == found[0].shape


def swept(point, branches, limit: float) -> list[np.ndarray]:
    outcomes = point.sweep(branches).all()
    assert [outcome.number for outcome in outcomes] == list(range(len(branches)))
    found = [np.asarray(outcome.logits).astype(np.float32) for outcome in outcomes]
    for row, edits in zip(found, branches, strict=True):
        assert far(row, point.resume(edits).logits) <= limit, edits
    assert min(far(found[0], row) for row in found[1:]) > limit  # edits say more than rounding
    return found


def far(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, in parts of the largest value."""
    one, other = (np.asarray(side).astype(np.float32) for side in (one, other))
    return float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-6))


def test_a_trace_is_one_patched_run_of_the_plain_model_a_cell(watched, exact):
    clean, tokens = watched.ids(1, 300), [5, 77, 400]
    corrupted = clean.copy()
    corrupted[0, 200] = 3 + (clean[0, 200] - 2) % 500
    plain, layers, positions = watched.exact, [0, 2, LAYERS], [[100], [200], [200, 299]]
    grid = exact.trace(clean, corrupted, layers=layers, positions=positions, tokens=tokens).finish()
    base = probabilities(plain, watched.on_device(corrupted), tokens)
    np.testing.assert_allclose(grid.corrupted, base, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        grid.clean, probabilities(plain, watched.on_device(clean), tokens), rtol=1e-3, atol=1e-6
    )
    hidden = plain(watched.on_device(clean), output_hidden_states=True, use_cache=False)
    there = {}
    with hands(plain, {LAYERS: lambda value: there.update(last=value.clone())}):
        plain(watched.on_device(clean), use_cache=False)
    states = [*hidden.hidden_states[:LAYERS], there["last"]]
    for row, layer in enumerate(layers):
        for column, group in enumerate(positions):

            def patched(value: torch.Tensor, layer=layer, group=group) -> torch.Tensor:
                value = value.clone()
                value[:, group] = states[layer][:, group]
                return value

            with hands(plain, {layer: patched}):
                expected = probabilities(plain, watched.on_device(corrupted), tokens)
            found = grid.probabilities[row, column]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert grid.cost.unchanged == 3  # position 100 lies before the difference
    assert far(grid.probabilities[0, 1], base) > 1e-2


def probabilities(plain, ids: torch.Tensor, tokens: list[int]) -> np.ndarray:
    logits = plain(ids, use_cache=False).logits[0, -1].double()
    return logits.softmax(-1)[tokens].cpu().numpy()
