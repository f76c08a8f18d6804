"""Hugging Face's own code on a served model gives what it gives on the model itself, bit for bit; what a
served model cannot do is refused by name."""

import copy
import gc
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import djinn_zmq as djinn
from djinn_zmq.client.forwards import Asked
from djinn_zmq.errors import NotServed, PromptError, RequestError
from djinn_zmq.hf import RemoteCausalLM, tokenizer_of
from djinn_zmq.hf.loading import loaded
from djinn_zmq.hf.opening import server_of
from djinn_zmq.wire.forwards import Crop, Repeat
from tests.engine.architectures import tiny_model

TINY = str(resources.files("djinn_zmq") / "models" / "tiny")
OTHERS = [
    "Gemma2",
    "GPT2",
]  # windows shorter than the prompt and full layers by turns; learned positions
MORE = ["GPTJ", "OPT", "Bloom", "Falcon", "Cohere2", "GptOss", "Lfm2"]
PROMPT = [[5, 9, 31, 7, 11, 40, 8]]
PADDED = [[0, 0, 0, 5, 9, 31, 7], [21, 9, 31, 7, 11, 40, 8]]  # on the left
MASK = [[0, 0, 0, 1, 1, 1, 1], [1] * 7]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server under test: their number shows in the last bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(served, tmp_path_factory):
    """By name: the plain model, and the served one in transformers' terms."""
    with served.connect() as server:

        @cache
        def made(name: str):
            folder = TINY
            if name != "tiny":
                folder = str(tmp_path_factory.mktemp(name))
                tiny_model(name).save_pretrained(folder)
            plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            return plain, RemoteCausalLM.of(server.model("tiny" if name == "tiny" else folder))

        yield made


@pytest.fixture(params=["tiny", *OTHERS])
def models(request, pair):
    return pair(request.param)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def both(models, ask):
    """What *ask* gives, or raises, with the plain model and with the served one."""
    found = []
    for model in models:
        torch.manual_seed(7)
        try:
            with torch.inference_mode():
                found.append(ask(model))
        except Exception as exc:  # noqa: BLE001
            found.append(exc)
    return found


# ---- forward


CALLS = {
    "ids alone": lambda ids, mask: {"input_ids": ids},
    "with labels": lambda ids, mask: {"input_ids": ids, "labels": ids.clone()},
    "with hidden states": lambda ids, mask: {"input_ids": ids, "output_hidden_states": True},
    "without a cache": lambda ids, mask: {"input_ids": ids, "use_cache": False},
    "as a padded batch": lambda ids, mask: {"input_ids": mask[0], "attention_mask": mask[1]},
    "with positions": lambda ids, mask: {
        "input_ids": mask[0],
        "attention_mask": mask[1],
        "position_ids": (mask[1].cumsum(-1) - 1).clamp(min=0),
        "labels": mask[0].masked_fill(mask[1] == 0, -100),
        "output_hidden_states": True,
    },
    "of the last three": lambda ids, mask: {"input_ids": ids, "logits_to_keep": 3},
    "of some": lambda ids, mask: {"input_ids": ids, "logits_to_keep": torch.tensor([1, 4])},
    "as a tuple": lambda ids, mask: {"input_ids": ids, "return_dict": False},
}


@pytest.mark.parametrize("call", CALLS)
def test_forward_gives_the_models_own_output(models, call: str) -> None:
    arguments = CALLS[call](torch.tensor(PROMPT), (torch.tensor(PADDED), torch.tensor(MASK)))
    own, remote = both(models, lambda model: model(**arguments))
    assert type(own) is type(remote), remote
    if isinstance(own, tuple):
        assert same(own[0], remote[0]) and len(own) == len(remote)
        return
    assert list(own.keys()) == list(remote.keys())
    assert same(own.logits, remote.logits)
    if "labels" in arguments:
        assert same(own.loss, remote.loss)
    if "output_hidden_states" in arguments:
        assert all(map(same, own.hidden_states, remote.hidden_states))
        assert len(own.hidden_states) == len(remote.hidden_states)


def test_a_cache_goes_on_branches_and_is_cropped_on_the_server(pair) -> None:
    def ask(model):
        first = model(torch.tensor(PROMPT))
        kept = first.past_key_values
        other = copy.deepcopy(kept)
        found = [model(torch.tensor([[3]]), past_key_values=kept).logits]
        found.append(model(torch.tensor([[4, 6]]), past_key_values=other).logits)
        kept.crop(-3)
        kept.batch_repeat_interleave(3)
        kept.reorder_cache(torch.tensor([2, 0, 1, 1]))
        found.append(model(torch.tensor([[5], [6], [7], [8]]), past_key_values=kept).logits)
        kept.batch_select_indices(torch.tensor([3, -4]))
        found.append(model(torch.tensor([[5], [6]]), past_key_values=kept).logits)
        return [*found, torch.tensor([kept.get_seq_length(), other.get_seq_length()])]

    own, remote = both(pair("tiny"), ask)
    assert all(map(same, own, remote)), (own, remote)


def test_a_programs_own_empty_cache_becomes_a_name_for_the_one_on_the_server(models) -> None:
    def ask(model):
        cache = DynamicCache(config=model.config)
        model(torch.tensor(PROMPT), past_key_values=cache)
        after = model(torch.tensor([[3]]), past_key_values=cache).logits
        return after, len(cache), cache.is_sliding, cache.get_seq_length()

    own, remote = both(models, ask)
    assert same(own[0], remote[0]) and own[1:] == remote[1:], remote


def test_a_cache_made_without_a_config_is_taken_where_the_model_has_no_windows(pair) -> None:
    def ask(model):
        cache = DynamicCache()
        model(torch.tensor(PROMPT), past_key_values=cache)
        after = model(torch.tensor([[3]]), past_key_values=cache).logits
        ids = model.generate(torch.tensor(PROMPT), past_key_values=DynamicCache(), max_new_tokens=3)
        return after, ids, torch.tensor([len(cache), cache.get_seq_length()])

    own, remote = both(pair("tiny"), ask)
    assert all(map(same, own, remote)), (own, remote)


# ---- generate


class Upto(transformers.StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10)


class Less(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - 3 * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])


GENERATES = {
    "greedily": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "sampling by typical_p, min_p, eta and epsilon": {
        "do_sample": True, "typical_p": 0.8, "min_p": 0.01, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-3,
    },
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "by beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "by beams that sample": {"num_beams": 3, "do_sample": True, "early_stopping": True},
    "with penalties": {
        "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2,
    },
    "with tokens forbidden, forced and biased": {
        "bad_words_ids": [[7], [9, 31]], "suppress_tokens": [4, 5], "forced_eos_token_id": 2,
        "sequence_bias": [[[11], 4.0]], "min_new_tokens": 3,
    },
    "with a processor of its own": {"logits_processor": LogitsProcessorList([Less()])},
    "with a stopping criterion": {"stopping_criteria": StoppingCriteriaList([Upto()])},
    "with allowed tokens": {"prefix_allowed_tokens_fn": lambda batch, ids: [1 + ids.numel() % 5, 8, 9]},
    "with guidance": {"guidance_scale": 1.5},
    "with a prompt's own phrases": {"prompt_lookup_num_tokens": 2},
    "without a cache": {"use_cache": False},
    "in chunks": {"prefill_chunk_size": 3},
    "contrastively": {"penalty_alpha": 0.6, "top_k": 4},
    "by layers that differ": {"dola_layers": "low"},
    "with forced words": {"force_words_ids": [[7]], "num_beams": 2},
    "in groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "with hidden states": {"output_hidden_states": True},
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATES)
@pytest.mark.filterwarnings("ignore")
def test_generate_gives_the_librarys_own_tokens_and_scores(models, how: str) -> None:
    def ask(model):
        return model.generate(
            torch.tensor(PROMPT),
            max_new_tokens=6,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **GENERATES[how],
        )

    own, remote = both(models, ask)
    if isinstance(own, Exception):  # the library itself refuses: the same way
        assert type(remote) is type(own), (own, remote)
        return
    if isinstance(remote, NotServed):
        assert (models[0].config.model_type, how) in REFUSED, remote
        return
    assert not isinstance(remote, Exception), remote
    assert same(own.sequences, remote.sequences)
    for name in ("scores", "logits"):
        assert all(map(same, own[name], remote[name]))
    if "output_hidden_states" in GENERATES[how]:
        for a, b in zip(own.hidden_states, remote.hidden_states, strict=True):
            assert all(map(same, a, b))


# Tokens are taken back, which a window does not allow on the server.
REFUSED = {("gemma2", "with a prompt's own phrases")}


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}, {"max_length": 9}])
def test_a_batch_padded_on_the_left_generates_as_the_model_itself(models, how) -> None:
    def ask(model):
        padded = {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK)}
        return model.generate(**padded, **({"max_new_tokens": 5} | how))

    own, remote = both(models, ask)
    assert same(own, remote)


def test_an_assistant_drafts_for_a_served_model_and_a_served_one_drafts(pair) -> None:
    plain, remote = pair("tiny")
    ids = torch.tensor(PROMPT)
    own = plain.generate(ids, max_new_tokens=6, assistant_model=copy.deepcopy(plain))
    assert same(own, remote.generate(ids, max_new_tokens=6, assistant_model=plain))
    assert same(own, plain.generate(ids, max_new_tokens=6, assistant_model=remote))


def test_a_streamer_gets_the_text_as_it_comes_and_a_generation_goes_on(pair) -> None:
    _, remote = pair("tiny")
    tokenizer = tokenizer_of(remote.served)

    def ask(model):
        streamer = TextIteratorStreamer(tokenizer)
        given = tokenizer("the capital of france is", return_tensors="pt")
        done = model.generate(
            **given, max_new_tokens=4, streamer=streamer, return_dict_in_generate=True
        )
        more = torch.cat([done.sequences, given.input_ids], dim=1)
        again = model.generate(more, max_new_tokens=4, past_key_values=done.past_key_values)
        return "".join(streamer), again

    own, other = both(pair("tiny"), ask)
    assert own[0] == other[0] and "paris" in own[0]
    assert same(own[1], other[1])


def test_the_tokenizer_and_the_configs_are_the_models_own(pair) -> None:
    plain, remote = pair("tiny")
    own, sent = transformers.AutoTokenizer.from_pretrained(TINY), tokenizer_of(remote.served)
    assert sent("ann and tom went out .").input_ids == own("ann and tom went out .").input_ids
    assert sent.get_vocab() == own.get_vocab()
    assert remote.generation_config.to_dict() == plain.generation_config.to_dict()
    differing = {"_name_or_path"}
    for name, value in plain.config.to_dict().items():
        assert name in differing or remote.config.to_dict()[name] == value, name
    assert isinstance(remote, type(plain)) and remote.num_parameters() == plain.num_parameters()


@pytest.mark.parametrize("name", MORE)
def test_other_architectures_are_called_and_generate_in_beams_as_by_themselves(pair, name) -> None:
    padded = {"input_ids": torch.tensor(PADDED), "attention_mask": torch.tensor(MASK)}

    def ask(model):
        out = model(**padded, output_hidden_states=True, labels=padded["input_ids"])
        beams = model.generate(
            **padded,
            max_new_tokens=4,
            num_beams=2,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return [out.logits, out.loss, *out.hidden_states, beams.sequences, *beams.scores]

    own, remote = both(pair(name), ask)
    assert len(own) == len(remote) and all(map(same, own, remote)), remote


@pytest.fixture(scope="module")
def large(pair):
    """A call, and what the plain model gives."""
    ids = torch.arange(12 * 250).reshape(12, 250) % 199

    def call(model):
        return model(ids, output_hidden_states=True, labels=ids)

    return call, both([pair("tiny")[0]], call)[0]


@pytest.mark.parametrize("way", ["lane", "bus", "tcp"])
def test_outputs_larger_than_a_message_come_whole_by_every_way(large, served, way: str) -> None:
    call, own = large
    endpoint = served.tcp if way == "tcp" else served.endpoint
    with djinn.connect(endpoint, lane=way == "lane") as server:
        (other,) = both([RemoteCausalLM.of(server.model("tiny"))], call)
    assert own.logits.nbytes > 1 << 20
    assert same(own.logits, other.logits) and same(own.loss, other.loss)
    assert all(map(same, own.hidden_states, other.hidden_states))


# ---- held by a debugger


PLACES = ["embedding", 0, "layers.1.self_attn", 2, "layers.2.mlp.input", "norm"]
WAIT_S = 20.0


def held(served, remote, stop_at, call, act):
    """What *call* gives while a debugger has *act* done at each stop."""
    with (
        served.connect() as server,
        ThreadPoolExecutor(1) as program,
        server.attach(remote.served.session_id, stop_at=stop_at) as attached,
    ):
        answer = program.submit(both, [remote], call)
        while not answer.done():
            stop = attached.wait(0.05)
            if stop is not None:
                act(stop, attached)
        return answer.result(WAIT_S)[0]


def test_a_forward_held_everywhere_and_let_go_gives_the_same_bits(models, served) -> None:
    ids, mask = torch.tensor(PADDED), torch.tensor(MASK)
    places = []

    def call(model):
        done = model(ids, attention_mask=mask, output_hidden_states=True, labels=ids)
        more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        again = model(
            torch.tensor([[5], [7]]), attention_mask=more, past_key_values=done.past_key_values
        )
        return [done.logits, done.loss, *done.hidden_states, again.logits]

    def act(stop, _):
        places.append(stop.place or stop.layer)
        assert stop.kind == "forward" and stop.checkpoint.shape[0] == 2
        stop.continue_()

    plain, remote = models
    gpt = plain.config.model_type == "gpt2"
    stops = [0, 2] if gpt else PLACES  # its modules have other names
    free = both([remote], call)[0]
    through = held(served, remote, stops, call, act)
    assert not isinstance(through, Exception), through
    assert all(map(same, free, through))
    assert len(places) == 2 * len(stops)
    assert same(both([plain], call)[0][0], through[0])


def test_what_a_debugger_adds_to_a_forward_is_what_a_hook_adds_to_the_model_itself(
    pair, served
) -> None:
    plain, remote = pair("tiny")
    vector = torch.linspace(-6, 6, 64)
    ids = tokenizer_of(remote.served)("the capital of france is", return_tensors="pt").input_ids

    def call(model):
        return model.generate(
            ids, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
        )

    def add(module, args, out):
        handle.remove()  # the first forward alone
        out[0, -1] = (out[0, -1].float() + vector).to(out.dtype)

    def act(stop, attached):
        attached.breaks()
        stop.continue_([djinn.Add(vector.numpy(), at=(0, -1))])

    free = both([remote], call)[0]
    handle = plain.model.layers[1].register_forward_hook(add)
    own = both([plain], call)[0]
    edited = held(served, remote, 2, call, act)
    assert same(own.sequences, edited.sequences)
    assert all(map(same, own.logits, edited.logits))
    assert not same(free.logits[0], edited.logits[0])


def test_a_held_forward_can_be_branched_where_it_is_alone_and_looked_at_in_any_case(
    pair, served
) -> None:
    _, remote = pair("tiny")
    found = []

    def act(stop, _):
        found.append(stop.checkpoint.top(1)[0].token)
        try:
            found.append(stop.checkpoint.resume().logits)
        except RequestError as exc:
            found.append(str(exc))
        stop.continue_()

    ids = torch.tensor(PROMPT)
    first = remote(ids)
    more = held(
        served,
        remote,
        2,
        lambda model: model(ids[:, :2], past_key_values=first.past_key_values),
        act,
    )
    logits = torch.from_numpy(found[1].view("int16")).view(torch.bfloat16)
    assert same(logits, more.logits[:, -1])
    held(served, remote, 2, lambda model: model(torch.tensor(PADDED)), act)
    assert "several rows of its own" in found[3]


# ---- what is refused


def test_a_precision_that_the_server_does_not_compute_with_is_refused_where_it_counts(pair) -> None:
    ids = torch.tensor(PROMPT)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(NotServed, match='float32 matmul precision "high"'):
            pair("GPT2")[1](ids)
        assert pair("tiny")[1](ids).logits.dtype == torch.bfloat16  # not in this dtype
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_recording_by_torch_is_refused_whose_logits_would_be_constants(pair) -> None:
    _, remote = pair("GPT2")
    with (
        pytest.raises(NotServed, match="cannot be recorded"),
        warnings.catch_warnings(action="ignore"),
    ):
        torch.jit.trace(lambda ids: remote(ids).logits, torch.tensor(PROMPT))


def test_experts_computed_otherwise_as_generate_asks_for_on_a_gpu_are_refused_by_name(pair) -> None:
    _, remote = pair("GptOss")
    own = remote.config._experts_implementation
    remote.set_experts_implementation(own)
    with pytest.raises(NotServed, match=f"served with '{own}'.* leave the outputs on the CPU"):
        remote.to("meta")  # what generate takes for a GPU
        with remote._optimize_model_for_decode():
            pass
    remote.to("cpu")
    assert remote.config._experts_implementation == own


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": torch.tensor([[1000]])}, "token id 1000"),
        ({"input_ids": torch.tensor([[1]]), "position_ids": torch.tensor([[999]])}, "position_ids"),
        ({"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[999]])}, "labels 999"),
        ({"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[1, 2]])}, "labels int64"),
        ({"input_ids": torch.tensor([[1]]), "attention_mask": torch.ones(3, 1)}, "attention_mask"),
        (
            {"input_ids": torch.tensor([[1]]), "attention_mask": torch.tensor([[7]])},
            "holds 7: 0 or 1",
        ),
        (
            {"input_ids": torch.tensor([[1]]), "attention_mask": torch.ones(1, 65)},
            "mask of 65 posit",
        ),
        (
            {"input_ids": torch.ones(2, 1).long(), "attention_mask": torch.zeros(1, 1)},
            "a row for each",
        ),
        ({"input_ids": torch.tensor([[1]]), "logits_to_keep": torch.tensor([3])}, "logits_to_keep"),
        ({"input_ids": torch.tensor([1])}, "input_ids of shape"),
        ({"input_ids": "words"}, "input_ids='words': a tensor, or lists of numbers of one length"),
        ({"input_ids": [[1], [2, 3]]}, r"input_ids=\[\[1\], \[2, 3\]\]: a tensor, or lists"),
        ({"input_ids": torch.tensor([[1.5]])}, "input_ids of dtype torch.float32: whole numbers"),
        ({"input_ids": [[1]], "position_ids": {}}, "position_ids={}: a tensor"),
        ({"input_ids": [[1]], "position_ids": [[0.5]]}, "position_ids of dtype torch.float32"),
        ({"input_ids": [[1]], "logits_to_keep": None}, "logits_to_keep=None: a whole number"),
        ({"input_ids": [[1]], "logits_to_keep": 2.5}, "logits_to_keep=2.5: a whole number"),
        ({"input_ids": [[1]], "use_cache": torch.ones(2)}, r"use_cache=tensor.*: True or False"),
    ],
)
def test_arguments_out_of_range_are_refused_and_the_next_call_is_served(
    pair, arguments, named: str
) -> None:
    _, remote = pair("GPT2")
    with pytest.raises((PromptError, RequestError), match=named):
        remote(**arguments)
    assert remote(torch.tensor([[1]])).logits.shape == (1, 1, 99)


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(pair) -> None:
    _, remote = pair("tiny")
    cache = remote(torch.tensor(PROMPT)).past_key_values
    with pytest.raises(PromptError, match="rows"):
        remote(torch.tensor([[1], [2]]), past_key_values=cache)
    assert cache.get_seq_length() == 7
    assert remote(torch.tensor([[1]]), past_key_values=cache).logits.shape[:2] == (1, 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([Repeat(2000)], "at most 1024 rows"),
        ([Repeat(1000)] * 2, "1000 rows of a past, each 1000 times"),
        ([Repeat(-1)], "each -1 times"),
        ([Repeat(1)] * 65, "65 changes"),
        ([Crop(8)], "7 positions without 8"),
        ([Crop(-1)], "without -1"),
        ([np.array([1])], "rows 1 to 1 of a past that has 1"),
        ([np.zeros((1, 2), np.int64)], r"shape \(1, 2\)"),
        ([Crop(7), Repeat(2)], "no past to change"),
    ],
)
def test_what_cannot_be_done_to_a_past_is_refused_before_it_is_tried(
    pair, changes, named: str
) -> None:
    served = pair("tiny")[1].served
    past = served.forward(Asked(np.array(PROMPT))).past
    with pytest.raises(RequestError, match=named):
        served.forward(Asked(np.array([[1]]), past, changes))
    assert served.forward(Asked(np.array([[1]]), past)).past.length == 8


def test_the_past_goes_with_the_last_that_names_it(pair, served) -> None:
    _, remote = pair("tiny")

    def held() -> int:
        sessions = served.status().sessions
        return next(one.kv for one in sessions if one.id == remote.served.session_id)

    gc.collect()  # of what earlier tests' errors hold on to
    remote(torch.tensor([[1]]), use_cache=False)
    before = held()
    out = remote(torch.tensor(PROMPT))
    assert held() > before
    del out
    remote(torch.tensor([[1]]), use_cache=False)  # carries what was forgotten
    assert held() == before


def test_a_process_keeps_its_connection_until_that_is_of_no_use_and_a_forked_one_has_its_own(
    served, monkeypatch
) -> None:
    first = server_of(served.endpoint, None)
    assert server_of(served.endpoint, None) is first
    first.close()
    lost = server_of(served.endpoint, None)
    monkeypatch.setattr(lost.connection._dealer, "lost", lambda: True)  # though it be back
    second = server_of(served.endpoint, None)
    assert second is not lost
    assert tokenizer_of("tiny", endpoint=served.endpoint)("paris")["input_ids"]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    child = server_of(served.endpoint, None)
    assert child is not second and second.ping() == child.ping() == "serving"
    for one in (lost, second, child):
        one.close()


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda made, _: RemoteCausalLM.of("tiny"), "served='tiny': a model of djinn's"),
        (lambda made, _: RemoteCausalLM.of(made.served, ["a"]), r"name=\['a'\]: text"),
        (lambda made, _: tokenizer_of(None), "model=None: a model of djinn's"),
        (lambda made, _: tokenizer_of("tiny", endpoint=["a"]), r"endpoint=\['a'\]: text"),
        (lambda made, _: RemoteCausalLM.from_pretrained("tiny", key={}), "key={}: the path"),
        (
            lambda made, _: loaded(made.served, "tiny", {"dtype": "float99"}),
            "dtype='float99': a torch",
        ),
        (
            lambda made, _: loaded(made.served, "tiny", {"torch_dtype": -1}),
            "torch_dtype=-1: a torch",
        ),
        (
            lambda made, _: loaded(made.served, "tiny", {"device_map": 2.5}),
            "device_map=2.5: a device",
        ),
        (lambda made, _: loaded(made.served, "tiny", {"config": 7}), "config=7: a config"),
        (
            lambda made, _: loaded(made.served, "tiny", {"generation_config": "x"}),
            "generation_config='x': a GenerationConfig",
        ),
        (
            lambda made, _: loaded(made.served, "tiny", {"revision": np.ones(2)}),
            r"revision=array.*served as it is",
        ),
        (lambda _, past: past.reorder_cache(None), "beam_idx=None: a tensor"),
        (lambda _, past: past.batch_select_indices([0.5]), "indices of dtype torch.float32: whole"),
        (lambda _, past: past.reorder_cache(torch.tensor([0, 1])), "beam_idx with row 1: a list"),
        (
            lambda _, past: past.batch_select_indices(torch.tensor([5])),
            "indices with row 5: a list",
        ),
        (
            lambda _, past: past.batch_select_indices(torch.tensor([-2])),
            "indices with row -1: a list",
        ),
        (lambda _, past: past.batch_select_indices([True, False]), "one for each of 1 row"),
        (lambda _, past: past.batch_select_indices([[True]]), "one for each of 1 row"),
        (lambda _, past: past.batch_select_indices([False]), r"shape \(0,\): a list of rows"),
        (lambda _, past: past.batch_repeat_interleave(0), "repeats=0: a whole number, 1 or more"),
        (lambda _, past: past.batch_repeat_interleave("2"), "repeats='2': a whole number"),
        (
            lambda _, past: past.batch_repeat_interleave(1 << 40),
            "rows to come of it: at most 131072",
        ),
        (
            lambda _, past: past.reorder_cache(torch.zeros(131073).long()),
            "131073 rows to come of it",
        ),
        (lambda _, past: past.crop(-1.5), "tokens_to_remove=-1.5: a whole number"),
    ],
)
def test_what_is_no_argument_at_all_is_refused_by_its_name_and_with_what_is_allowed(
    pair, ask, said: str
) -> None:
    _, remote = pair("tiny")
    past = remote(torch.tensor(PROMPT)).past_key_values
    with pytest.raises(RequestError, match=said):
        ask(remote, past)
    assert not past.changes and past.batch_size == 1
