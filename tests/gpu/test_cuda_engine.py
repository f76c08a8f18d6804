"""An engine on a GPU does what one on a CPU does, bit for bit against the same GPU's plain model."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

import djinn_zmq as djinn
from djinn_zmq.engine.models import shapes

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
    del plain, logits
    torch.cuda.empty_cache()  # other servers use this GPU, too
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


def test_a_generation_behind_a_long_past_gives_the_plain_models_bits_every_time(server):
    """cuDNN's attention over a past does not: the plain model takes PyTorch's own for its steps."""
    model, steps = server.model("llama-2-13b"), 6
    prompt = np.random.default_rng(5).integers(0, 32000, 700)
    plain = shapes.make("llama-2-13b", "auto", torch.device("cuda:0")).eval()
    wanted, cache = [], transformers.DynamicCache(config=plain.config)
    with torch.inference_mode():
        ids = torch.from_numpy(prompt)[None].cuda()
        for step in range(steps):
            torch.backends.cuda.enable_cudnn_sdp(step == 0)
            logits = plain(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            wanted.append(logits[:, -1].cpu().view(torch.uint8).numpy().tobytes())
            ids = logits[:, -1].float().argmax(-1, keepdim=True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    del plain, logits
    torch.cuda.empty_cache()  # other servers use this GPU, too
    for stop in (None, 0, 2, 5):
        where = {} if stop is None else {"stop_at": 20, "steps": stop}
        with model.session() as session:
            going = session.generate(prompt, steps, logits="last", ends=(), **where)
            made = [token.logits.tobytes() for token in going]
            if stop is not None:
                made += [token.logits.tobytes() for token in going.resume()]
        assert made == wanted, stop


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


# ---- tiers


def test_a_checkpoint_on_the_gpu_is_resumed_from_every_tier_with_the_same_bits(tiered):
    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    assert point.tier == "device"
    bits, whole = np.asarray(point.hidden).tobytes(), point.resume().logits.tobytes()
    for tier in ("host", "disk"):
        assert point.evict(tier) == tier
        assert np.asarray(point.hidden).tobytes() == bits
        assert point.resume().logits.tobytes() == whole
        assert point.tier == "device"
    point.evict("disk")
    assert point.prefetch("device") == "device"
    assert point.resume().logits.tobytes() == whole


def test_every_layers_checkpoint_resumes_from_its_slab_without_being_changed(tiered):
    model = tiered.model("llama-2-13b")
    saved = model.run(IDS, save_at=range(41))
    wanted = saved.logits.tobytes()
    bits = {layer: np.asarray(point.hidden).tobytes() for layer, point in saved.checkpoints.items()}
    for layer, point in saved.checkpoints.items():
        assert point.resume().logits.tobytes() == wanted, layer
        assert np.asarray(point.hidden).tobytes() == bits[layer]
        same = point.resume(stop_at=layer, logits="none")
        assert "copy" not in dict(same.spans)


def test_a_hidden_state_is_seen_where_it_stands_on_the_gpu(tiered):
    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    tensor = point.hidden_cuda()
    assert tensor.is_cuda and tensor.dtype == torch.bfloat16
    seen = tensor.cpu().view(torch.uint8).numpy().tobytes()
    assert seen == np.asarray(point.hidden).tobytes()
    with pytest.raises(djinn.errors.RequestError, match="a view of the checkpoint is in use"):
        point.evict("host")
    del tensor
    model.ping()
    assert point.evict("host") == "host"


def test_an_edit_in_place_on_the_gpu_is_resumed_with_no_byte_moved(tiered):
    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    whole = point.resume().logits.tobytes()
    edited = point.writable_cuda()
    assert point.resume(hidden=edited).logits.tobytes() == whole
    edited[0, -1] = 0
    done = point.resume(hidden=edited)
    assert done.logits.tobytes() == point.resume([djinn.Zero(at=(0, -1))]).logits.tobytes()
    assert point.resume().logits.tobytes() == whole  # the checkpoint is untouched
    with pytest.raises(djinn.errors.EditError, match=r"not one of writable_cuda"):
        point.resume(hidden=edited[:, :10])
    with pytest.raises(djinn.errors.EditError, match=r"not one of writable_cuda"):
        point.resume(hidden=torch.zeros_like(edited))


def test_an_edit_in_place_on_the_gpu_is_kept_as_it_is_and_stays_the_clients(tiered):
    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    edited, other = point.writable_cuda(), torch.cuda.Stream()
    kept = []
    for value in range(5):
        with torch.cuda.stream(other):  # not waited for: the resume does that
            edited[0, -1] = value
        kept.append(point.resume(hidden=edited, stop_at=20, logits="none").checkpoint)
        assert kept[-1].tier == "device"
    edited[:] = 9  # theirs are others
    torch.cuda.synchronize()
    row = np.zeros(model.hidden_size, np.float32)
    for value, one in enumerate(kept):
        wanted = point.resume([djinn.Set(row + value, at=(0, -1))], stop_at=20).checkpoint
        assert np.asarray(one.hidden).tobytes() == np.asarray(wanted.hidden).tobytes()
        assert one.resume().logits.tobytes() == wanted.resume().logits.tobytes()
        assert one.evict("host") == "host"
    ones = point.resume(hidden=edited, stop_at=20, logits="none").checkpoint
    assert np.asarray(ones.hidden).astype(np.float32).tobytes() == (
        np.full(point.shape, 9, np.float32).tobytes()
    )


def test_a_device_slot_that_was_not_lent_is_refused(tiered):
    from djinn_zmq.client.calls import Call
    from djinn_zmq.wire.messages import Resume, Wanted
    from djinn_zmq.wire.ops import Op
    from djinn_zmq.wire.tensors import Device, Tensor

    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    view = point.hidden_cuda()
    tensor = point._kept.tensor
    for where in (Device(1, 0, 1), Device(99, 0, 0), Device(1, 1 << 40, 7)):
        named = Tensor(tensor.dtype, tensor.shape, where)
        call = Call(
            Op.RESUME,
            Resume(point.id, named, (), Wanted(None, (), "last", 0)),
            session=model.session_id,
        )
        with pytest.raises(djinn.errors.AccessDenied, match="was not lent to you"):
            model.connection.drive(_one(call))
    del view


def _one(call):
    return (yield call)


CLIENT = """
import sys, numpy as np, torch, djinn_zmq as djinn
server = djinn.connect(sys.argv[1]); model = server.model("llama-2-13b")
point = model.run(np.arange(300)[None], stop_at=20).checkpoint
tensors = [point.writable_cuda() for _ in range(3)] + [point.hidden_cuda()]
print("editing", flush=True)
while True:
    for tensor in tensors[:3]:
        tensor.add_(1)
"""


def test_a_client_killed_in_the_middle_of_an_edit_gives_its_slots_back_and_harms_nobody(
    tiered, gpu_server
):
    model = tiered.model("llama-2-13b")
    point = model.run(IDS, stop_at=20).checkpoint
    whole = point.resume().logits.tobytes()
    client = subprocess.Popen([sys.executable, "-c", CLIENT, gpu_server], stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"editing\n"
    client.kill()
    client.wait()
    client.stdout.close()
    limit = time.monotonic() + 30
    while len(tiered.status().sessions) > 1:
        assert time.monotonic() < limit
    for _ in range(40):
        assert point.resume().logits.tobytes() == whole
    points = [model.run(IDS, stop_at=20).checkpoint for _ in range(8)]
    assert all(one.resume().logits.tobytes() == whole for one in points)
    mine = point.writable_cuda()
    assert point.resume(hidden=mine).logits.tobytes() == whole


def test_pressure_on_the_gpu_moves_what_was_used_last_and_memory_plateaus(tiered):
    model = tiered.model("llama-2-13b")
    points = [model.run(IDS + n, stop_at=20).checkpoint for n in range(120)]  # 3 MB each
    tiers = [point.tier for point in points]
    assert tiers[0] != "device" and tiers[-1] == "device"
    device = next(one for one in tiered.status().memory.tiers if one.name == "device")
    assert 0 < device.used <= device.limit
    for n in (0, 60, 119):
        wanted = model.run(IDS + n).logits.tobytes()
        assert points[n].resume().logits.tobytes() == wanted


def test_a_poisoned_cuda_context_ends_the_engine_and_loses_no_copy(
    gpu_folder, monkeypatch, tmp_path
):
    from djinn_zmq.client.local import private_server
    from tests.end_to_end import poison

    trigger = poison.lay(tmp_path, monkeypatch)
    state = tmp_path / "state"
    with (
        private_server(
            gpu_folder(), "cuda:0", "auto", "--model=tiny", f"--state={state}"
        ) as endpoint,
        djinn.connect(endpoint, timeout_s=60) as server,
    ):
        tiny = server.model("tiny")
        whole = tiny.run(FRANCE).logits.tobytes()
        points = [tiny.run(FRANCE, stop_at=layer).checkpoint for layer in (1, 2, 3)]
        points[1].evict("disk")
        pid = server.status().engines[0].pid
        trigger.touch()
        with pytest.raises(djinn.errors.Lost, match="ended itself: its CUDA context is poisoned"):
            tiny.run("the capital of spain is")
        trigger.unlink()
        for point in points:
            assert point.resume().logits.tobytes() == whole
        assert server.status().engines[0].pid != pid
