"""Sweeps and traces through real processes: streamed, cut into batches, refused by name."""

import asyncio
import gc
from types import SimpleNamespace

import numpy as np
import pytest

from djinn_zmq import Add, Patch, Scale, Set, Zero, aio
from djinn_zmq.errors import (
    EditError,
    LayerError,
    PromptError,
    RequestError,
    SweepTooLarge,
    UnknownCheckpoint,
)
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"


@pytest.fixture(scope="module")
def model(served):
    with served.connect() as server:
        yield server.model("tiny")


@pytest.fixture
def point(model):
    return model.run(FRANCE, stop_at=2).checkpoint


def close(one, other):
    one, other = one.astype(np.float32), other.astype(np.float32)
    assert np.abs(one - other).max() <= 2.0**-7 * np.abs(other).max()  # bfloat16


def test_a_sweep_streams_an_outcome_a_branch_and_says_what_it_skipped(model, point):
    branches = [[Scale(part / 4)] for part in range(8)] + [Zero(at=(0, part)) for part in range(5)]
    sweep = point.sweep(branch for branch in branches)
    seen = []
    for outcome in sweep:
        seen.append(outcome.number)
        branch = point.resume(branches[outcome.number])
        close(outcome.logits, branch.logits)
        assert outcome.top(1)[0].token == branch.top(1)[0].token
        assert 0 < sweep.done <= sweep.total == 13
    assert seen == list(range(13))
    assert (sweep.result.layers, sweep.result.layers_full) == (13 * 2, 13 * 4)
    assert "50% skipped" in str(sweep.result)
    assert point.resume().top(1)[0].token == "paris"


@pytest.mark.parametrize("shared", [True, False])
def test_what_travelled_with_a_sweep_that_is_dropped_comes_back(served, shared):
    with served.connect(shared=shared) as server:
        model = server.model("tiny")
        point = model.run(np.ones((23, 200), int), stop_at=4, logits="none").checkpoint
        large = [[Add(np.zeros(point.shape, np.float32))] for _ in range(2)]  # of more than a piece
        used = server.status().memory.used
        point.sweep(large, logits="none").finish()  # and of one that is not dropped: once
        for _ in point.sweep(large, logits="none"):
            break
        gc.collect()
        point.resume(large[0], stop_at=4).checkpoint.release()  # whatever has values to send
        if shared:
            assert server.connection.sharing._pool.used == 0
        until(lambda: server.status().memory.used == used, "uploads are released")


def test_an_array_of_the_clients_own_is_not_used_again_while_a_sweep_may_read_it(served):
    async def main() -> None:
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            point = (await model.run(FRANCE, stop_at=2)).checkpoint
            values = await point.writable()
            values[...] = 0
            sweep = point.sweep([Set(values), Zero()])
            del values
            first = asyncio.create_task(anext(sweep))
            await asyncio.sleep(0)  # it is asked
            gc.collect()
            assert not server.connection.sharing._ended
            assert (await first).logits.tobytes() == (await anext(sweep)).logits.tobytes()
            await sweep.finish()

    asyncio.run(main())


@pytest.mark.parametrize(("dtype", "requests"), [("float64", 3), ("float32", 2)])
def test_more_values_than_one_request_carries_go_in_several(model, point, dtype, requests):
    # 2560 bytes each, beside the meta, or 1280 within it
    large = [np.full((1, 5, 64), part / 100, dtype) for part in range(150)]
    sweep = point.sweep([Add(vector) for vector in large], logits=1)
    outcomes = sweep.all()
    assert [outcome.number for outcome in outcomes] == list(range(150))
    assert sweep.result.branches == sweep.done == 150 and sweep.result.batches == requests
    alone = point.resume([Add(large[149])]).top(1)[0]
    assert outcomes[149].top(1)[0].token == alone.token
    assert outcomes[149].top(1)[0].probability == pytest.approx(alone.probability, abs=0.01)


def test_heads_are_swept_from_inside_a_layer(model):
    heads = model.run(FRANCE, stop_at="layers.2.self_attn.heads").checkpoint
    sweep = heads.sweep([Zero(at=(0, -1, head)) for head in range(4)], tokens=model.encode("paris"))
    for outcome in sweep:
        branch = heads.resume(Zero(at=(0, -1, outcome.number)))
        close(outcome.logits, branch.logits)
        likeliest = branch.top(1)[0]
        assert outcome.token_probabilities[0, 0] == pytest.approx(likeliest.probability, abs=0.01)


def test_a_sweep_left_in_the_middle_is_cancelled_and_the_session_goes_on(model, point):
    sweep = point.sweep([[Scale(1.0 + part / 1000)] for part in range(400)], memory=500_000)
    assert next(sweep).number == 0
    sweep.close()
    with pytest.raises(StopIteration):
        next(sweep)
    assert point.resume().top(1)[0].token == "paris"
    for dropped in (
        point.sweep([[Scale(1.0 + part / 1000)] for part in range(400)], memory=500_000),
        model.trace(FRANCE, GERMANY, memory=500_000),
    ):
        next(dropped)
    del dropped, sweep
    assert point.resume().top(1)[0].token == "paris"  # which takes the word along
    until(lambda: model.ping() == "idle", "nothing of what was dropped goes on")


def test_the_grid_shows_where_the_answer_comes_from(model):
    trace = model.trace(FRANCE, GERMANY)
    cells = list(trace)
    assert sorted(cell.number for cell in cells) == list(range(25))
    assert {cell.total for cell in cells} == {25} and cells[-1].done == 25
    grid = trace.result
    assert grid.texts == ("paris", "berlin") and grid.probabilities.shape == (5, 5, 2)
    assert grid.clean[0] > 0.99 and grid.corrupted[0] < 0.01
    assert grid.probabilities[0, 3, 0] > 0.99 and grid.probabilities[4, 4, 0] > 0.99
    np.testing.assert_allclose(grid.recovered[4, 4], 1, atol=0.02)
    assert grid.cost.unchanged >= 15  # what comes before the country is the same
    here = model.run(GERMANY, stop_at=2).checkpoint
    there = model.run(FRANCE, stop_at=2).checkpoint
    patched = here.resume(Patch(there, at=(0, 3)))
    assert grid.probabilities[2, 3, 0] == pytest.approx(patched.top(1)[0].probability, abs=0.01)
    lines = str(grid).splitlines()
    grid._repr_pretty_(SimpleNamespace(text=(shown := []).append), False)  # in a notebook
    assert shown == [str(grid)]
    assert lines[0].startswith('P("paris"): clean 1.000, corrupted 0.000')
    assert lines[1].split()[-4:] == ["3:", "germany", "4:", "is"] and len(lines) == 7


def test_a_grid_of_chosen_layers_groups_and_tokens(model):
    grid = model.trace(
        model.encode(FRANCE), GERMANY, layers=[3, 1], positions=[3, [3, 4]], tokens=["rome", 145]
    ).finish()
    assert (grid.layers, grid.positions) == ((1, 3), ((3,), (3, 4)))
    assert grid.texts == ("rome", "paris")
    assert grid.probabilities[0, 0, 1] > 0.99 and grid.probabilities[1, 1, 1] > 0.99
    assert "3: germany  3,4: germany is" in str(grid)


def test_what_cannot_be_swept_is_refused_and_the_session_goes_on(model, point):
    gone = model.run(FRANCE, stop_at=1).checkpoint
    gone.release()
    for call, kind, words in (
        (lambda: point.sweep([]), RequestError, "no branches"),
        (lambda: point.sweep(Zero()), RequestError, "a list of branches"),
        (
            lambda: point.sweep([Zero()], logits="all"),
            RequestError,
            'logits=\'all\': "last", "none", or how',
        ),
        (lambda: point.sweep([Zero()], memory=-1), RequestError, "a positive number of bytes"),
        (lambda: point.sweep([Zero(), 3]).all(), RequestError, "3 is no edit"),
        (lambda: point.sweep([Add]).all(), RequestError, "Add'> is no edit"),
        (lambda: point.sweep([Zero(), Zero(at=(0, 9))]).all(), EditError, "branch 1: edit 0"),
        (lambda: point.sweep([Zero()], memory=1000).all(), SweepTooLarge, "1000 B may be used"),
        (lambda: point.sweep([Zero()], tokens=[999]).all(), RequestError, "token 999"),
        (lambda: point.sweep([Zero()], logits=2).all()[0].logits, RequestError, "not asked for"),
        (lambda: gone.sweep([Zero()]).all(), UnknownCheckpoint, "does not exist"),
        (lambda: model.trace(FRANCE, "paris is").finish(), PromptError, "positions must match"),
        (lambda: model.trace([FRANCE, FRANCE], GERMANY).finish(), PromptError, "2 prompts"),
        (lambda: model.trace(FRANCE, GERMANY, layers=5).finish(), LayerError, "layer 5 does not"),
        (lambda: model.trace(FRANCE, GERMANY, layers=[]), LayerError, "at least one"),
        (lambda: model.trace(FRANCE, GERMANY, positions="x"), RequestError, "a whole number"),
        (
            lambda: model.trace(FRANCE, GERMANY, tokens="of france").finish(),
            RequestError,
            "is 2 tokens",
        ),
    ):
        with pytest.raises(kind, match=words):
            call()
        assert point.resume().top(1)[0].token == "paris"


def test_more_of_the_logits_than_a_frame_carries_is_refused_by_name(served):
    with served.connect(shared=False) as server:
        many = server.model("tiny").run([FRANCE] * 700, stop_at=2, logits="none").checkpoint
        with pytest.raises(
            RequestError, match=r"takes 1.1 MiB for 700 prompts, a part .* at most 1.0 MiB"
        ):
            many.sweep([Zero()], logits=200).all()
        (outcome,) = many.sweep([Zero()], logits=100).all()
        assert outcome.log_norm.shape == (700,)


def test_sweeps_stream_to_asyncio_code_over_tcp_while_others_run(served):
    async def main() -> None:
        async with aio.connect(served.tcp) as server:
            model = await server.model("tiny")
            point = (await model.run(FRANCE, stop_at=2)).checkpoint

            async def swept() -> list[int]:
                sweep = point.sweep([Scale(1 + part / 50) for part in range(40)], logits=1)
                return [outcome.number async for outcome in sweep]

            numbers, grid, run = await asyncio.gather(
                swept(), model.trace(FRANCE, GERMANY).finish(), model.run(GERMANY)
            )
            assert numbers == list(range(40)) and grid.texts == ("paris", "berlin")
            assert (await run.top(1))[0].token == "berlin"

    asyncio.run(main())
