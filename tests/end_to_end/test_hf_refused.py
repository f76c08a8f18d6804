"""What a program does to a model, or about it, that a served one would not see: refused by name."""

import copy
import functools
import pickle
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DynamicCache

from djinn_zmq.errors import NotServed
from djinn_zmq.hf import RemoteCausalLM
from djinn_zmq.hf.surroundings import Code, check

TINY = str(resources.files("djinn_zmq") / "models" / "tiny")
PROMPT = [[5, 9, 31, 7, 11, 40, 8]]


@pytest.fixture(scope="module")
def remote(served) -> Iterator[RemoteCausalLM]:
    with served.connect() as server:
        yield RemoteCausalLM.of(server.model("tiny"))


# ---- the model


def test_what_needs_the_weights_here_is_refused_by_name(remote) -> None:
    ids = torch.tensor(PROMPT)
    static = transformers.StaticCache(config=remote.config, max_cache_len=20)

    def first_of(cache):
        return cache.layers[0]

    def cache_of_other_layers():
        cache = DynamicCache()
        cache.layer_class_to_replicate = transformers.cache_utils.StaticLayer
        return cache

    def cache_of_its_own(where):
        cache = DynamicCache(config=remote.config)
        where(cache).update = print
        return cache

    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY).eval()
    filled = plain(ids).past_key_values
    for act, named in (
        (lambda: remote(inputs_embeds=torch.zeros(1, 2, 64)), "inputs_embeds"),
        (lambda: remote(ids, output_attentions=True), "output_attentions"),
        (lambda: remote(ids, past_key_values=static), "StaticCache"),
        (lambda: remote(ids, past_key_values=filled), "with keys and values in it"),
        (lambda: remote(ids, shift_labels=ids), "shift_labels"),
        (lambda: remote.generate(ids, cache_implementation="static"), "cache_implementation"),
        (lambda: remote.to(torch.float32), "served in torch.bfloat16"),
        (lambda: remote.to(torch.bfloat16), "casting to torch.bfloat16: it is served so"),
        (lambda: remote(ids, is_causal=False), "is_causal"),
        (lambda: remote(ids.to("meta")), 'input_ids on "meta"'),
        (lambda: torch.func.vmap(lambda one: remote(one[None]).logits)(ids), "torch.func"),
        (lambda: remote(ids, output_hidden_states=[1]), r"output_hidden_states=\[1\]: True or"),
        (lambda: remote(ids, output_hidden_states=1), "output_hidden_states=1: True or False"),
        (lambda: remote(ids, past_key_values=cache_of_its_own(lambda c: c)), "methods of the pro"),
        (lambda: remote(ids, past_key_values=cache_of_its_own(first_of)), "methods of the program"),
        (lambda: remote(ids, past_key_values=cache_of_other_layers()), "methods of the program"),
        (lambda: setattr(remote(ids).past_key_values, "update", print), "assigning cache.update"),
        (remote.train, "train"),
        (remote.requires_grad_, "requires_grad_"),
        (lambda: copy.deepcopy(remote), "copy"),
        (lambda: pickle.dumps(remote), "pickling"),
        (lambda: list(remote.parameters()), "parameters"),
        (lambda: remote.save_pretrained("x"), "save_pretrained"),
        (lambda: remote.model.layers, '"model"'),
        (lambda: remote(ids).past_key_values.layers, "cache.layers"),
        (lambda: copy.copy(remote(ids).past_key_values).update(ids, ids, 0), "update"),
    ):
        with pytest.raises(NotServed, match=named):
            act()
    assert not hasattr(remote, "lm_head")
    assert remote.num_parameters(only_trainable=True) == remote.num_parameters()
    assert remote(ids, output_router_logits=False, foo=None).hidden_states is None
    assert remote.eval().requires_grad_(False) is remote
    assert remote.num_parameters(only_trainable=True) == 0


def a_layer(_):
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda remote: setattr(remote, "lm_head", a_layer(remote)), 'assigning "lm_head"'),
        (lambda remote: setattr(remote, "model", None), 'assigning "model"'),
        (lambda remote: setattr(remote, "probe", a_layer(remote)), 'assigning "probe"'),
        (lambda remote: delattr(remote, "lm_head"), 'deleting "lm_head"'),
        (lambda remote: remote.add_module("lm_head", a_layer(remote)), "add_module"),
        (lambda remote: remote.set_submodule("lm_head", a_layer(remote)), "set_submodule"),
        (lambda remote: remote.register_buffer("scale", torch.ones(1)), "register_buffer"),
        (lambda remote: remote.apply(print), "apply"),
        (lambda remote: list(remote.children()), "children.*stops"),
        (lambda remote: list(remote.named_children()), "named_children"),
        (lambda remote: list(remote.modules()), "named_modules"),
        (lambda remote: remote.get_submodule("model.layers.0"), "get_submodule"),
        (lambda remote: remote.get_parameter("lm_head.weight"), "get_parameter"),
        (lambda remote: remote.base_model, '"base_model"'),  # transformers' says: the model itself
        (lambda remote: setattr(remote, "training", True), "train"),
        (lambda remote: setattr(remote, "loss_function", print), "loss_function"),
        (lambda remote: setattr(remote, "loss_type", "ForTokenClassification"), "loss_type"),
        (lambda remote: remote.register_full_backward_hook(print), "backward_hook.*gradients"),
    ],
)
def test_a_change_that_torch_would_take_and_the_server_not_see_is_refused_by_name(
    remote, act, named: str
) -> None:
    with pytest.raises(NotServed, match=named):
        act(remote)
    remote.of_a_program = 7  # its own attributes are its own
    assert not remote.training and remote.of_a_program == 7


# ---- what is about it


@contextmanager
def hook_on_all():
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        yield
    finally:
        hook.remove()


def in_place_of(home, name, value=None):
    """A block in which *name* of *home* is another function, that calls the own one."""
    own = getattr(home, name)
    other = functools.wraps(own)(lambda *args, **named: own(*args, **named))
    return unittest.mock.patch.object(home, name, other if value is None else value)


LLAMA = transformers.models.llama.modeling_llama
REGISTRY = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
MATH = torch.nn.attention.SDPBackend.MATH


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (lambda: in_place_of(LLAMA.LlamaDecoderLayer, "forward"), "LlamaDecoderLayer.forward is"),
        (lambda: in_place_of(LLAMA.LlamaForCausalLM, "forward"), "LlamaForCausalLM.forward is"),
        (lambda: in_place_of(LLAMA, "apply_rotary_pos_emb"), "apply_rotary_pos_emb is not the lib"),
        (lambda: in_place_of(LLAMA, "LlamaMLP", torch.nn.Identity), "modeling_llama.LlamaMLP is"),
        (lambda: in_place_of(LLAMA.DynamicCache, "update"), "DynamicCache.update is not"),
        (lambda: in_place_of(LLAMA.LlamaDecoderLayer, "__call__"), "DecoderLayer.__call__ is not"),
        (lambda: in_place_of(torch.nn.Linear, "forward"), "Linear.forward is not"),
        (
            lambda: in_place_of(torch.nn.functional, "scaled_dot_product_attention"),
            "scaled_dot_product_attention is not the library's own",
        ),
        (
            lambda: unittest.mock.patch.dict(REGISTRY._local_mapping, sdpa=print),
            r'ALL_ATTENTION_FUNCTIONS\["sdpa"\]',
        ),
        (hook_on_all, "hook on every module.*stops"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast.*served in torch.bfloat16"),
        (lambda: torch.nn.attention.sdpa_kernel(MATH), "sdpa_kernel"),
        (lambda: in_place_of(torch, "rsqrt"), "torch.rsqrt is not the library's own"),
        (torch.overrides.BaseTorchFunctionMode, "BaseTorchFunctionMode"),
        (torch.utils._python_dispatch.TorchDispatchMode, "TorchDispatchMode"),
    ],
)
def test_what_is_about_a_model_and_would_change_a_plain_one_is_refused_by_name_as_long_as_it_is(
    remote, block, named: str
) -> None:
    ids = torch.tensor(PROMPT)
    with block(), pytest.raises(NotServed, match=named):
        remote(ids)
    with torch.device("cpu"):  # a mode too, which changes nothing
        assert remote(ids).logits.shape[:2] == (1, 7)


def test_a_kernel_that_only_a_gpu_has_or_that_no_step_runs_with_may_be_off() -> None:
    code, cuda = Code(transformers.LlamaForCausalLM, "sdpa"), torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        check(code, torch.device("cpu"), torch.bfloat16)
        check(code, cuda, torch.bfloat16, over_past=True)
        with pytest.raises(NotServed, match="kernel of attention switched off"):
            check(code, cuda, torch.bfloat16)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_code_that_was_replaced_before_a_model_is_opened_is_refused_with_its_name() -> None:
    llama = transformers.LlamaForCausalLM
    Code(llama, "sdpa").check()
    gemma = transformers.models.gemma.modeling_gemma.GemmaMLP.forward
    for name, block in (
        ("LlamaAttention", in_place_of(LLAMA.LlamaAttention, "forward")),
        ("LlamaMLP", in_place_of(LLAMA.LlamaMLP, "forward", gemma)),
    ):
        with block, pytest.raises(NotServed, match=f"{name}.forward is not the library's own"):
            Code(llama, "sdpa")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 2),
        ("_attn_implementation", "eager"),
        ("is_causal", False),  # of which a config says nothing else
        ("rope_parameters", {"rope_theta": 5.0}),
    ],
)
def test_a_config_that_is_changed_after_a_model_is_opened_is_refused_by_the_name_in_it(
    remote, name: str, value
) -> None:
    remote = RemoteCausalLM.of(remote.served)
    remote.config.pad_token_id, remote.config.output_hidden_states = 3, True
    assert len(remote(torch.tensor(PROMPT)).hidden_states) == 5
    setattr(remote.config, name, value)
    with pytest.raises(
        NotServed, match=rf"config.{name.lstrip('_')}=.*changed after .*served with"
    ):
        remote(torch.tensor(PROMPT))
