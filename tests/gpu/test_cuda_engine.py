"""An engine on a GPU does what one on a CPU does, bit for bit against the same GPU's plain model."""

import os
import signal

import numpy as np
import pytest
import torch

import djinn_zmq as djinn
from djinn_zmq.engine import shapes

pytestmark = pytest.mark.gpu

FRANCE = "the capital of france is"
IDS = np.random.default_rng(3).integers(0, 32000, (1, 300))


@pytest.fixture
def server(endpoint):
    with djinn.connect(endpoint, timeout_s=60) as one:
        yield one


def test_tiny_stops_and_resumes_on_the_gpu(server):
    tiny = server.model("tiny")
    assert tiny.device == "cuda:0"
    whole = tiny.run(FRANCE).logits.tobytes()
    for layer in range(5):
        point = tiny.run(FRANCE, stop_at=layer).checkpoint
        assert point.resume().logits.tobytes() == whole
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_a_13b_shape_resumes_at_every_layer_with_the_bits_of_the_plain_model(server):
    model = server.model("llama-2-13b")
    assert (model.num_layers, model.dtype, model.device) == (40, "bfloat16", "cuda:0")
    with torch.inference_mode():
        plain = shapes.make("llama-2-13b", "auto", torch.device("cuda:0")).eval()
        logits = plain(torch.from_numpy(IDS).cuda(), use_cache=False).logits[:, -1]
        wanted = logits.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    del plain
    saved = model.run(IDS, save_at=range(41))
    assert saved.logits.tobytes() == wanted
    for layer, point in saved.checkpoints.items():
        assert point.resume().logits.tobytes() == wanted, layer


def test_edits_and_replacements_reach_the_gpu(server):
    model = server.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    whole = np.asarray(point.hidden)
    untouched = point.resume().logits.tobytes()
    assert point.resume(hidden=whole).logits.tobytes() == untouched
    edited = point.resume([djinn.Scale(0.5, at=(0, -1))], stop_at=20).checkpoint
    wanted = whole.copy()
    wanted[0, -1] = (wanted[0, -1].astype(np.float32) * 0.5).astype(whole.dtype)
    assert np.asarray(edited.hidden).tobytes() == wanted.tobytes()
    assert point.resume([djinn.Patch(point)]).logits.tobytes() == untouched


def test_checkpoints_outlive_a_killed_gpu_engine(server):
    tiny = server.model("tiny")
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    whole = point.resume().logits.tobytes()
    os.kill(server.status().engines[0].pid, signal.SIGKILL)
    while True:
        try:
            again = point.resume(timeout_s=100)
            break
        except djinn.errors.Lost:
            continue
    assert again.logits.tobytes() == whole
