"""Hugging Face programs on a model that a GPU serves: what the library itself gives on that GPU, bit for bit."""

import copy
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

import djinn_zmq as djinn
from djinn_zmq.hf import RemoteCausalLM
from tests.end_to_end.test_hf import GENERATES, both, held, same
from tests.gpu.plain import hands, raw, scaled

pytestmark = pytest.mark.gpu

TINY = str(resources.files("djinn_zmq") / "models" / "tiny")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(watched, watching):
    """The plain model, and the served one in transformers' terms, its outputs on the same device."""
    served = watching.model(str(watched.source["brief"]))
    return watched.brief, RemoteCausalLM.of(served).to(watched.device)


@pytest.fixture
def padded(watched):
    """Two prompts, one of them padded on the left."""
    ids, mask = watched.ids(2, 400), np.ones((2, 400), np.int64)
    ids[0, :100], mask[0, :100] = 0, 0
    return {"input_ids": watched.on_device(ids), "attention_mask": watched.on_device(mask)}


CALLS = {
    "with all that it gives": lambda ids: {
        "input_ids": ids, "labels": ids.clone(), "output_hidden_states": True,
    },
    "without a cache": lambda ids: {"input_ids": ids, "use_cache": False},
    "of some positions": lambda ids: {
        "input_ids": ids, "logits_to_keep": torch.tensor([1, 698], device=ids.device),
    },
}  # fmt: skip


def alike(own, remote) -> None:
    """Outputs of a forward, each on the device."""
    assert not isinstance(remote, Exception), remote
    assert list(own.keys()) == list(remote.keys())
    assert same(own.logits, remote.logits) and own.logits.device == remote.logits.device
    if own.get("loss") is not None:
        assert same(own.loss, remote.loss)
    for one, other in zip(own.hidden_states or (), remote.hidden_states or (), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("call", CALLS)
def test_forward_gives_the_plain_models_output(watched, models, call) -> None:
    given = watched.on_device(watched.ids(1, 700))
    alike(*both(models, lambda model: model(**CALLS[call](given))))


def test_a_padded_batch_and_a_step_behind_it_are_the_plain_models(watched, models, padded) -> None:
    def ask(model):
        first = model(**padded, labels=padded["input_ids"], output_hidden_states=True)
        mask = torch.cat([padded["attention_mask"], padded["attention_mask"][:, -1:]], dim=1)
        more = watched.on_device(np.array([[5], [7]]))
        again = model(more, attention_mask=mask, past_key_values=first.past_key_values)
        return first, again

    own, remote = both(models, ask)
    for one, other in zip(own, remote, strict=True):
        alike(one, other)


def test_a_cache_goes_on_branches_and_is_changed_on_the_gpu(watched, models) -> None:
    def ask(model):
        def on(ids):
            return watched.on_device(np.array(ids))

        kept = model(watched.on_device(watched.ids(1, 500))).past_key_values
        other = copy.deepcopy(kept)
        found = [model(on([[3]]), past_key_values=kept).logits]
        found.append(model(on([[4, 6]]), past_key_values=other).logits)
        kept.crop(-3)
        kept.batch_repeat_interleave(3)
        kept.reorder_cache(on([2, 0, 1, 1]))
        found.append(model(on([[5], [6], [7], [8]]), past_key_values=kept).logits)
        kept.batch_select_indices(on([3, 0]))
        return [*found, model(on([[5], [6]]), past_key_values=kept).logits]

    own, remote = both(models, ask)
    assert all(map(same, own, remote)), remote


HOW = ["greedily", "sampling", "by beams", "by beams that sample", "with penalties",
       "with a prompt's own phrases", "with hidden states"]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.filterwarnings("ignore")
def test_generate_gives_the_librarys_own_tokens_and_scores(watched, models, how) -> None:
    def ask(model):
        return model.generate(
            watched.on_device(watched.ids(1, 600)),
            max_new_tokens=5,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **GENERATES[how],
        )

    own, remote = both(models, ask)
    assert not isinstance(remote, Exception), remote
    assert same(own.sequences, remote.sequences)
    for name in ("scores", "logits"):
        assert all(map(same, own[name], remote[name]))
    for one, other in zip(own.hidden_states or (), remote.hidden_states or (), strict=True):
        assert all(map(same, one, other))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_a_batch_padded_on_the_left_generates_as_the_model_itself(models, padded, how) -> None:
    own, remote = both(models, lambda model: model.generate(**padded, max_new_tokens=4, **how))
    assert same(own, remote), remote


def test_what_a_debugger_changes_in_a_forward_is_what_a_hook_changes(watched, models) -> None:
    plain, remote = models
    ids, at = watched.on_device(watched.ids(1, 600)), "layers.2.self_attn"
    places = []

    def call(model):
        return model.generate(
            ids, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )

    def act(stop, attached) -> None:
        places.append((stop.kind, stop.place or stop.layer, raw(stop.checkpoint.hidden)))
        if len(places) == 2:  # in the first forward alone
            attached.breaks()
        stop.continue_([djinn.Scale(-1.0)] if stop.place else ())

    edited = held(watched, remote, [2, at], call, act)
    there = []

    def once(value: torch.Tensor) -> torch.Tensor | None:
        there.append(raw(value))
        return scaled(-1.0)(value) if len(there) == 1 else None

    with hands(plain, {at: once}):
        own = both([plain], call)[0]
    assert not isinstance(edited, Exception), edited
    assert [one[:2] for one in places] == [("forward", 2), ("forward", at)]
    assert places[1][2] == there[0]
    assert same(own.sequences, edited.sequences)
    assert all(map(same, own.logits, edited.logits))


# ---- djinn exec


PROGRAM = """
import hashlib, sys, threading
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

torch.set_num_threads(1)
name, long, device = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
inputs = tokenizer("the capital of france is", return_tensors="pt").to(device)
print(model.device, inputs.input_ids.device == model.device)
with torch.no_grad():
    out = model(**inputs, labels=inputs.input_ids, output_hidden_states=True)
for data in (out.logits, out.loss, *out.hidden_states):
    print(data.device, hashlib.sha256(data.float().cpu().numpy().tobytes()).hexdigest())
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=8)))
torch.manual_seed(3)
print(model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0).tolist())
print(model.generate(**inputs, max_new_tokens=8, num_beams=3, num_return_sequences=3).tolist())
padded = tokenizer(["the capital of germany is", "ann and tom"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**padded.to(device), max_new_tokens=5)))
streamer = TextIteratorStreamer(tokenizer)
given = {**inputs, "streamer": streamer, "max_new_tokens": 4}
thread = threading.Thread(target=model.generate, kwargs=given)
thread.start()
print("".join(streamer))
thread.join()
print(pipeline("text-generation", name)("the capital of", max_new_tokens=3))
large = AutoModelForCausalLM.from_pretrained(long).to(device)
ids = torch.randint(3, 512, (2, 600), generator=torch.Generator().manual_seed(4)).to(device)
made = large.generate(ids, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
print(made.sequences[:, 600:].tolist())
for data in made.logits:
    print(hashlib.sha256(data.cpu().numpy().tobytes()).hexdigest())
"""
# As engines do: see tests.gpu.plain. The program is told nothing of it.
ALONE = """
import functools, runpy, sys
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache

own = LlamaForCausalLM.forward

@functools.wraps(own)
def forward(self, *args, **named):
    over_past = any(isinstance(one, Cache) and one.get_seq_length() for one in named.values())
    torch.backends.cuda.enable_cudnn_sdp(not over_past)
    try:
        return own(self, *args, **named)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)

LlamaForCausalLM.forward = forward
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_unmodified_program_says_under_exec_what_it_says_alone_on_the_gpu(
    watched, tmp_path
) -> None:
    (tmp_path / "tiny").symlink_to(TINY)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "alone.py").write_text(ALONE)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "DJINN_ENDPOINT": watched.endpoint,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with watched.connect() as server:
        server.model(str(watched.source["brief"]))  # what it has loaded is served by its directory
        words = ["program.py", "tiny", str(watched.source["brief"]), watched.device.type]
        alone, under = (
            subprocess.Popen(
                [sys.executable, *through, *words],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for through in (["alone.py"], ["-m", "djinn_zmq.cli.main", "exec", "--"])
        )
        own, served = (process.communicate(timeout=200) for process in (alone, under))
    assert alone.returncode == 0, own[1]
    assert under.returncode == 0, served[1]
    assert served[0] == own[0]
    assert "paris" in own[0]
