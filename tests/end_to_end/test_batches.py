"""Many prompts at once, of different lengths: each as if it were alone."""

import asyncio
import gc

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.client import run as run_room
from djinn_zmq.errors import EditError, PromptError, RequestError
from tests.end_to_end.conftest import until
from tests.engine.architectures import tiny_model

PROMPTS = ["the capital of france is", "the", "the capital of germany", "mary and john went out ."]
ROW = np.linspace(-3, 3, 64).astype(np.float32)


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("where", ["ipc", "tcp"])
def test_prompts_of_different_lengths_give_what_each_gives_alone(served, where):
    endpoint = served.endpoint if where == "ipc" else served.tcp
    with djinn.connect(endpoint) as server:
        tiny = server.model("tiny")
        batch = tiny.batch(PROMPTS)
        assert len(batch) == 4 and len({run.ids.shape for run in batch}) > 2
        alone = [tiny.run(prompt) for prompt in PROMPTS]
        assert [bits(run.logits) for run in batch] == [bits(run.logits) for run in alone]
        assert batch.top(2) == [run.top(2) for run in alone]


def test_each_has_edits_of_its_own(tiny):
    batch = tiny.batch(PROMPTS, stop_at=2)
    edits = [[djinn.Add(ROW, at=(0, -1)), djinn.Scale(2.0)], None, djinn.Zero(at=(0, 0)), []]
    assert [point.layer for point in batch.checkpoints] == [2] * 4
    done = batch.resume(edits)
    for prompt, own, run in zip(PROMPTS, edits, done, strict=True):
        point = tiny.run(prompt, stop_at=2).checkpoint
        assert bits(run.logits) == bits(point.resume(own or []).logits)
    zeroed = tiny.batch(PROMPTS, edits=djinn.Zero())
    assert [bits(run.logits) for run in zeroed] == [
        bits(tiny.run(prompt, edits=djinn.Zero()).logits) for prompt in PROMPTS
    ]


def test_a_patch_across_prompts_of_one_batch_needs_no_barrier(tiny):
    france, _, germany, _ = tiny.batch(PROMPTS, stop_at=1).checkpoints
    assert france.resume(djinn.Patch(germany, at=(0, 3))).top(1)[0].token == "berlin"


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bloom", "Gemma2"])
def test_a_longer_prompt_beside_it_changes_no_prediction(server, tmp_path, name):
    """As padding does where positions count from the wrong end or a mask is forgotten (nnsight #672):
    by absolute positions, by positions made of the mask, by distances, within windows."""
    tiny_model(name).save_pretrained(tmp_path)
    model = server.model(tmp_path)
    prompts = [[5, 6, 7], list(range(1, 40)), [9]]
    batch = model.batch(prompts, logits="all")
    assert [bits(run.logits) for run in batch] == [
        bits(model.run(prompt, logits="all").logits) for prompt in prompts
    ]
    model.close()


def test_one_that_is_refused_is_named_and_the_others_leave_nothing(server, tiny):
    before = server.status().memory.checkpoints
    with pytest.raises(PromptError, match="257 tokens") as refused:
        tiny.batch(["the", [1] * 257, "a"], stop_at=2)
    assert refused.value.__notes__ == ["in request 1 of 3, counted from 0"]
    with pytest.raises(PromptError) as refused:
        tiny.batch(["the", [[1, 2], [3]]])
    assert "in prompt 1 of 2, counted from 0" in refused.value.__notes__
    batch = tiny.batch(PROMPTS, stop_at=2)
    with pytest.raises(RequestError, match="edits for 1 prompt, not for 4"):
        batch.resume([djinn.Zero()])
    with pytest.raises(EditError, match="does not fit"):
        batch.resume([None, djinn.Add(np.zeros(3)), None, None])
    with pytest.raises(PromptError, match="a list of prompts"):
        tiny.batch("the")
    assert batch.resume().top(1)[0][0].token == "paris"
    del batch, refused
    gc.collect()  # tracebacks hold what was refused, in circles
    tiny.ping()  # takes along what is released, past the server
    until(lambda: server.status().memory.checkpoints == before, "nothing is left")


def test_what_came_behind_one_that_was_interrupted_is_released(server, tiny, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = server.status().memory.checkpoints
    monkeypatch.setattr(run_room, "Run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.batch(PROMPTS, stop_at=2)
    tiny.ping()
    until(lambda: server.status().memory.checkpoints == before, "nothing is left")


def test_the_same_in_asyncio_code(served):
    async def main():
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            batch = await model.batch(PROMPTS, stop_at=1)
            done = await batch.resume()
            return [row[0].token for row in await done.top(1)]

    tokens = asyncio.run(main())
    with served.connect() as server:
        assert tokens == [row[0].token for row in server.model("tiny").batch(PROMPTS).top(1)]
