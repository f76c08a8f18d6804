"""Looks: what the server says of a checkpoint is what the fetched tensor says."""

import asyncio
import gc

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.client import forwards, looks
from djinn_zmq.client.arrays import RemoteArray
from djinn_zmq.client.forwards import Asked
from djinn_zmq.errors import LayerError, RequestError, SelectionError, StopError, UnknownCheckpoint
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"


@pytest.fixture(scope="module")
def model(served):
    with served.connect() as server:
        yield server.model("tiny")


@pytest.fixture(scope="module")
def france(model):
    return model.run(FRANCE, save_at="all")


@pytest.fixture(scope="module")
def germany(model):
    return model.run(GERMANY, save_at="all")


def test_all_saves_every_layer_from_the_start_of_the_run_to_its_stop(model, france):
    assert sorted(france.checkpoints) == [0, 1, 2, 3, 4]
    assert sorted(model.run(FRANCE, save_at="all", stop_at=2).checkpoints) == [0, 1, 2]
    assert sorted(france.checkpoints[3].resume(save_at="all").checkpoints) == [3, 4]
    with pytest.raises(StopError, match='"none" names no module'):
        model.run(FRANCE, save_at=["none"])


def test_norms_are_those_of_the_fetched_tensor(france):
    for point in france.checkpoints.values():
        whole = np.asarray(point.hidden).astype(np.float64)
        norms = point.norms()
        assert (norms.dtype, norms.shape) == (np.float32, (1, 5))
        np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=-1), rtol=1e-6)


def test_top_of_the_last_layer_is_the_models_own_answer_and_of_earlier_ones_the_lens(france):
    assert france.checkpoints[4].top(5) == france.top(5)
    early = france.checkpoints[1].top(2)
    assert [(one.token, one.probability) for one in early] == france.lens(-1, k=2)[1, 4]


def test_the_lens_runs_the_models_own_tail_on_each_saved_layer(model, france):
    lens = france.lens()
    assert lens.layers == (0, 1, 2, 3, 4) and lens.positions == (0, 1, 2, 3, 4)
    # The tail on a layer's hidden state is the last layer's checkpoint with that in its place.
    for layer in lens.layers:
        swapped = france.checkpoints[4].resume(
            hidden=np.asarray(france.checkpoints[layer].hidden), logits="all"
        )
        logits = swapped.logits[0].astype(np.float64)
        assert lens.ids[lens.layers.index(layer), 0, :, 0].tolist() == logits.argmax(-1).tolist()
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        np.testing.assert_allclose(
            lens.probabilities[lens.layers.index(layer), 0, :, 0], shares.max(-1), rtol=1e-9
        )
    assert lens[4, 4][0][0] == "paris"


def test_the_lens_prints_as_a_table_of_layers_and_positions(model):
    run = model.run([FRANCE, GERMANY], save_at=[1, 4])
    first, second = str(run.lens([3, -1])).split("\n\n")
    lines = first.splitlines()
    assert lines[0].split() == ["layer", "3:", "france", "4:", "is"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "4"]
    assert lines[2].endswith("paris 1.00")
    assert second.splitlines()[0].split() == ["layer", "3:", "germany", "4:", "is"]
    assert "berlin" in second.splitlines()[-1]


def test_the_lens_leaves_out_what_has_been_released(model):
    run = model.run(FRANCE, save_at=[1, 2, 3])
    run.checkpoints[2].release()
    assert run.checkpoints[1].lens(-1).layers == (1, 3)


def test_diff_says_where_two_checkpoints_differ_and_whether_they_do(france, germany):
    here, there = france.checkpoints[2], germany.checkpoints[2]
    one = np.asarray(here.hidden).astype(np.float64)
    two = np.asarray(there.hidden).astype(np.float64)
    diff = here.diff(there)
    np.testing.assert_allclose(diff.norms, np.linalg.norm(one - two, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(
        diff.cosine,
        (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1),
        rtol=1e-6,
    )
    assert diff.largest == np.abs(one - two).max() == abs(one - two)[diff.at]
    assert not diff.same_bits and "largest difference" in str(diff)
    assert diff.norms[0, :3].tolist() == [0, 0, 0]  # what comes before the country is the same
    same = here.diff(here.resume(stop_at=2).checkpoint)
    assert same.same_bits and same.largest == 0 and str(same) == "equal bit for bit"


def test_attention_of_the_next_and_of_a_named_layer(france):
    weights = france.checkpoints[1].attention()
    assert weights.shape[::2] == (1, 5) and weights.shape[2:] == (5, 5)
    np.testing.assert_allclose(weights.astype(np.float32).sum(-1), 1, atol=0.02)
    assert not np.triu(weights.astype(np.float32), 1).any()
    later = france.checkpoints[0].attention(2)  # layer 1 runs first, as it would in a resume
    assert later.tobytes() == weights.tobytes()
    assert france.checkpoints[2].resume().top(1)[0].token == "paris"


@pytest.mark.parametrize("shared", [True, False], ids=["slots", "pieces"])
def test_an_answer_too_large_for_a_frame_comes_all_the_same_and_leaves_nothing(served, shared):
    with served.connect(shared=shared) as server:
        model = server.model("tiny")
        run = model.run(np.arange(200) % 200, stop_at=0)
        heads = run.checkpoint.attention().shape[1]
        used = server.status().memory.used
        weights = run.checkpoint.attention(3)
        assert weights.shape == (1, heads, 200, 200)
        np.testing.assert_allclose(weights.astype(np.float32).sum(-1), 1, atol=0.05)
        gc.collect()
        model.ping()  # takes along what is released, past the server
        until(lambda: server.status().memory.used <= used, "its memory is back")


def test_what_cannot_be_seen_is_refused_and_the_session_goes_on(model, france):
    point = france.checkpoints[2]
    gone = model.run(FRANCE, stop_at=1).checkpoint
    gone.release()
    for call, kind, words in (
        (
            lambda: point.attention(2),
            LayerError,
            "layer 2 lies behind the checkpoint after layer 2: ahead are 3 to 4",
        ),
        (lambda: point.attention(5), LayerError, r'"tiny" has layers 1 to 4'),
        (lambda: france.checkpoints[4].attention(), LayerError, "layer 5 does not exist"),
        (lambda: point.top(0), RequestError, "1 to 208 can be asked for"),
        (lambda: point.top(2.5), RequestError, "k=2.5: a whole number"),
        (lambda: point.top(batch=1), RequestError, "batch=1: 0 to 0, of a batch of 1"),
        (lambda: france.lens(5), SelectionError, "position 5 of a prompt of 5"),
        (lambda: france.lens([]), SelectionError, "no position"),
        (lambda: france.lens(0)[3, 1], SelectionError, "has no position 1"),
        (lambda: point.diff("x"), RequestError, "give a checkpoint"),
        (lambda: point.diff(model.run("paris", stop_at=2).checkpoint), RequestError, "compared"),
        (gone.norms, UnknownCheckpoint, "does not exist"),
        (lambda: point.diff(gone), UnknownCheckpoint, "does not exist"),
    ):
        with pytest.raises(kind, match=words):
            call()
        assert point.resume().top(1)[0].token == "paris"


def test_somebody_elses_checkpoint_is_not_looked_at(served, france):
    with djinn.connect(served.tcp) as stranger:
        theirs = stranger.model("tiny").run(FRANCE, stop_at=2).checkpoint
        theirs.id = france.checkpoints[2].id
        with pytest.raises(UnknownCheckpoint, match="not yours"):
            theirs.norms()


def test_looks_are_awaited_in_asyncio_code(served):
    async def main() -> None:
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            run = await model.run(FRANCE, save_at="all")
            point = run.checkpoints[2]
            norms, top, lens, diff, weights = await asyncio.gather(
                point.norms(),
                point.top(2),
                run.lens(-1),
                point.diff(run.checkpoints[3]),
                point.attention(),
            )
            assert norms.shape == (1, 5) and len(top) == 2 and weights.shape[2:] == (5, 5)
            assert lens[4, 4][0][0] == "paris" and not diff.same_bits

    asyncio.run(main())


def test_what_an_answer_left_on_the_server_is_released_where_the_first_of_it_is_not_fetched(
    server, tiny, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    ids = np.ones((4, 250), np.int64)
    point = tiny.run(ids, save_at=range(5), logits="none").checkpoint
    used = server.status().memory.used
    with monkeypatch.context() as patch:
        patch.setattr(RemoteArray, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            point.lens(k=20)
        with pytest.raises(KeyboardInterrupt):
            tiny.forward(Asked(ids, hidden=True))
    with monkeypatch.context() as patch:
        for room in (looks, forwards):
            patch.setattr(room, "left_behind", interrupt)
        with pytest.raises(KeyboardInterrupt):
            point.lens(k=20)
        with pytest.raises(KeyboardInterrupt):
            tiny.forward(Asked(ids, hidden=True))
    gc.collect()
    server.ping()  # what nobody refers to any more is said with the next request
    until(lambda: server.status().memory.used == used, "all of it is released")
    mine = next(one for one in server.sessions() if one.id == tiny.session_id)
    assert mine.kv == 0
    assert point.lens(k=20).ids.shape == (5, 4, 250, 20)
