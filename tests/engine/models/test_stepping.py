"""Taking a decoder apart at its layers: what is refused, and what is left as it was."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from djinn_zmq.engine.models.stepping import Recording, Stepper, find_layers, same_bits
from djinn_zmq.errors import ModelRefused
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model

CPU = torch.device("cpu")
Loop = Callable[..., torch.Tensor]  # (model, hidden, **what each layer is given) → hidden


class _Llama(LlamaModel):
    """A Llama whose forward goes through its layers in a way of its own."""

    through: Loop

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        given = {
            "attention_mask": None,
            "position_ids": positions,
            "position_embeddings": self.rotary_emb(hidden, position_ids=positions),
        }
        hidden = type(self).through(self, hidden, **given)
        return transformers.modeling_outputs.BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden)
        )


def llama_with(through: Loop) -> LlamaForCausalLM:
    """A tiny Llama with *through* in the place of its loop over the layers."""
    model = tiny_model("Llama")
    model.model.__class__ = type("Altered", (_Llama,), {"through": staticmethod(through)})
    return model


def straight(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        hidden = layer(hidden, **given)
    return hidden


def with_something_between(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        hidden = layer(hidden, **given) + 0.25
    return hidden


def with_a_skip_around_all(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    return hidden + straight(model, hidden, **given)


def out_of_order(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for place in (1, 0, 2):
        hidden = model.layers[place](hidden, **given)
    return hidden


def one_of_them_twice(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for place in (0, 1, 1, 2):
        hidden = model.layers[place](hidden, **given)
    return hidden


def all_but_the_last(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in list(model.layers)[:-1]:
        hidden = layer(hidden, **given)
    return hidden


def by_keyword(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    for layer in model.layers:
        hidden = layer(hidden_states=hidden, **given)
    return hidden


def without_a_batch(model: LlamaModel, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    for layer in model.layers:
        flat = layer(flat)
    return flat.reshape(hidden.shape)


def checked(model: nn.Module) -> Stepper:
    stepper = Stepper(model)
    stepper.check(VOCAB_SIZE, CPU)
    return stepper


def stepped(stepper: Stepper, ids: torch.Tensor) -> torch.Tensor:
    recording = stepper.record(ids)
    hidden = recording.embedded.clone()
    for index in range(stepper.num_layers):
        hidden = stepper.step(index, hidden, recording)
    return stepper.tail(ids, hidden)


# ---- which layers


def test_the_layers_are_the_decoders_own_in_order() -> None:
    model = tiny_model("OPT")  # whose base_model is not its decoder
    assert find_layers(model) == list(model.model.decoder.layers)


def test_a_module_that_is_no_decoder_is_refused_by_name() -> None:
    with pytest.raises(ModelRefused, match="Linear is not a decoder"):
        find_layers(nn.Linear(2, 2))


def test_a_model_without_a_list_of_layers_is_refused_by_name() -> None:
    model = tiny_model("Llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelRefused, match="LlamaModel has 0 lists of 3 layers: one is needed"):
        Stepper(model)


def test_a_model_with_two_lists_of_the_same_length_is_refused_by_name() -> None:
    model = tiny_model("Llama")
    model.model.others = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ModelRefused, match="LlamaModel has 2 lists of 3 layers: one is needed"):
        Stepper(model)


def test_a_model_with_more_layers_than_its_config_says_is_refused() -> None:
    model = tiny_model("Llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelRefused, match="LlamaModel has 0 lists of 2 layers"):
        Stepper(model)


def test_a_model_without_layers_is_refused() -> None:
    model = tiny_model("Llama")
    model.model.layers = nn.ModuleList()
    model.config.num_hidden_layers = 0
    with pytest.raises(ModelRefused, match="calls 0 of its 0 layers"):
        checked(model)


# ---- the self-check


def test_the_altered_llama_of_these_tests_is_served_while_it_alters_nothing() -> None:
    stepper = checked(llama_with(straight))
    ids = prompts(2)
    assert same_bits(stepped(stepper, ids), tiny_model("Llama")(input_ids=ids).logits)


def test_what_a_model_does_around_its_layers_is_its_own_and_exact() -> None:
    stepper = checked(llama_with(with_a_skip_around_all))
    ids = prompts(2)
    assert same_bits(stepped(stepper, ids), llama_with(with_a_skip_around_all)(ids).logits)
    assert not torch.equal(stepped(stepper, ids), tiny_model("Llama")(ids).logits)


def test_a_model_that_does_something_between_its_layers_is_refused() -> None:
    with pytest.raises(ModelRefused) as refused:
        checked(llama_with(with_something_between))
    assert "stepped through its layers it gives other logits than by itself" in str(refused.value)
    assert "693 of 693 differ for a prompt of shape (1, 7)" in str(refused.value)


def test_a_difference_in_one_bit_is_enough_to_be_refused() -> None:
    model = llama_with(straight)
    calls = []

    def flip_once(module: nn.Module, given: Any, logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        if len(calls) == 2:  # the tail's, after the plain one
            logits.view(torch.int32)[0, 3, 5] ^= 1
        return logits

    model.lm_head.register_forward_hook(flip_once)
    with pytest.raises(ModelRefused, match="1 of 693 differ"):
        checked(model)


def test_the_sign_of_a_zero_is_a_difference_that_is_counted() -> None:
    model = llama_with(straight)
    signs = iter([1.0, -1.0])
    model.lm_head.register_forward_hook(lambda *of: torch.zeros_like(of[2]) * next(signs))
    with pytest.raises(ModelRefused, match="693 of 693 differ"):
        checked(model)


def test_logits_of_another_shape_are_refused_with_both_shapes() -> None:
    model = llama_with(straight)
    widths = iter([99, 98])
    model.lm_head.register_forward_hook(lambda *of: of[2][..., : next(widths)])
    with pytest.raises(ModelRefused, match=r"\(1, 7, 98\), not torch.float32 \(1, 7, 99\)"):
        checked(model)


def test_a_model_that_calls_its_layers_out_of_order_is_refused() -> None:
    with pytest.raises(ModelRefused, match="its forward calls layer 1 in place 0"):
        checked(llama_with(out_of_order))


def test_a_model_that_calls_a_layer_twice_is_refused() -> None:
    with pytest.raises(ModelRefused, match="its forward calls layer 1 in place 2"):
        checked(llama_with(one_of_them_twice))


def test_a_model_that_leaves_a_layer_out_is_refused() -> None:
    with pytest.raises(ModelRefused, match="its forward calls 2 of its 3 layers"):
        checked(llama_with(all_but_the_last))


def test_layers_that_take_hidden_states_by_keyword_are_refused() -> None:
    with pytest.raises(ModelRefused, match="not given hidden states as first argument"):
        checked(llama_with(by_keyword))


def test_hidden_states_that_are_not_three_dimensional_are_refused() -> None:
    model = llama_with(without_a_batch)
    for layer in model.model.layers:
        layer.forward = types.MethodType(lambda layer, hidden: hidden + layer.mlp(hidden), layer)
    with pytest.raises(ModelRefused, match=r"hidden states of shape \(7, 32\), not \(batch, pos"):
        checked(model)


def test_the_self_check_keeps_to_the_positions_a_model_has() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=3, vocab_size=VOCAB_SIZE
    )
    stepper = Stepper(transformers.GPT2LMHeadModel(config).eval())
    assert stepper.check(VOCAB_SIZE, CPU, 3).startswith("logits of 1×3 and 2×3 tokens equal")


def test_a_model_whose_weights_are_not_numbers_is_compared_by_its_bits() -> None:
    model = tiny_model("Llama")
    model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    stepper = checked(model)
    ids = prompts(1)
    assert stepper.plain(ids).isnan().all()
    assert same_bits(stepped(stepper, ids), stepper.plain(ids))


# ---- what is left as it was


def test_a_layer_that_writes_into_its_input_changes_no_checkpoint_and_no_recording() -> None:
    model = tiny_model("Llama")
    for layer in model.model.layers:
        own = layer.forward

        def forward(hidden: torch.Tensor, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            return hidden.copy_(own(hidden.clone(), *args, **kwargs))

        layer.forward = forward
    stepper = checked(model)
    ids = prompts(2)
    expected = tiny_model("Llama")(input_ids=ids, use_cache=False).logits
    recording = stepper.record(ids)
    embedded = recording.embedded.clone()
    hidden = stepper.step(0, embedded.clone(), recording)
    checkpoint = hidden.clone()  # what Keeping does
    for _ in range(2):
        hidden = checkpoint.clone()
        for index in range(1, stepper.num_layers):
            hidden = stepper.step(index, hidden, recording)
        assert same_bits(stepper.tail(ids, hidden), expected)
    assert same_bits(recording.embedded, embedded)


def test_a_record_runs_no_layer() -> None:
    model = tiny_model("Llama")
    ran = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    stepper = Stepper(model)
    stepper.record(prompts(1))
    assert not ran


@pytest.mark.parametrize("name", ["Llama", "GPTJ"])
def test_after_a_record_and_a_tail_the_model_runs_as_before(name: str) -> None:
    model = tiny_model(name)
    ids = prompts(2)
    expected = model(input_ids=ids).logits
    stepper = checked(model)
    recording = stepper.record(ids)
    assert same_bits(model(input_ids=ids).logits, expected)
    stepper.tail(ids, recording.embedded)
    assert same_bits(model(input_ids=ids).logits, expected)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("during", ["record", "tail"])
def test_an_exception_in_a_record_or_a_tail_leaves_the_model_as_it_was(during: str) -> None:
    model = tiny_model("Llama")
    stepper = checked(model)
    ids = prompts(2)
    expected = stepper.plain(ids)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    part = model.model.rotary_emb if during == "record" else model.model.norm
    hook = part.register_forward_hook(interrupt)
    with pytest.raises(Interrupted):
        stepper.record(ids) if during == "record" else stepper.tail(ids, torch.zeros(2, 11, 32))
    hook.remove()
    assert same_bits(stepper.plain(ids), expected)
    assert same_bits(stepped(stepper, ids), expected)


def test_an_exception_inside_a_layer_leaves_the_model_as_it_was() -> None:
    model = tiny_model("Llama")
    stepper = checked(model)
    ids = prompts(2)
    expected = stepper.plain(ids)
    recording = stepper.record(ids)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    hidden = stepper.step(0, recording.embedded.clone(), recording)
    with pytest.raises(Interrupted):
        stepper.step(1, hidden, recording)
    hook.remove()
    assert same_bits(stepper.plain(ids), expected)
    hidden = stepper.step(0, recording.embedded.clone(), recording)
    for index in (1, 2):
        hidden = stepper.step(index, hidden, recording)
    assert same_bits(stepper.tail(ids, hidden), expected)


def test_two_models_and_two_prompts_taken_in_turns_do_not_mix() -> None:
    steppers = [checked(tiny_model(name)) for name in ("Gemma2", "GPTJ")]
    asked = [(stepper, ids) for stepper in steppers for ids in (prompts(1), prompts(3, length=8))]
    expected = [stepper.plain(ids) for stepper, ids in asked]
    recordings = [stepper.record(ids) for stepper, ids in asked]
    states = [recording.embedded.clone() for recording in recordings]
    for index in range(4):
        for place, (stepper, _) in enumerate(asked):
            if index < stepper.num_layers:
                states[place] = stepper.step(index, states[place], recordings[place])
    for (stepper, ids), hidden, logits in zip(asked, states, expected, strict=True):
        assert same_bits(stepper.tail(ids, hidden), logits)


def test_a_copy_of_one_model_has_layers_of_its_own() -> None:
    model = tiny_model("Llama")
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    one, two = checked(model), checked(other)
    ids = prompts(1)
    assert not torch.equal(stepped(one, ids), stepped(two, ids))
    assert same_bits(stepped(two, ids), two.plain(ids))


# ---- the same bits


def test_a_nan_has_the_same_bits_as_itself_and_not_as_another_nan() -> None:
    one = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert one.isnan().all()
    assert same_bits(one, one.clone())
    assert not same_bits(one, one.flip(0))


def test_minus_zero_has_other_bits_than_zero() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_the_same_bits_need_the_same_shape_and_dtype() -> None:
    zeros = torch.zeros(2, 2)
    assert not same_bits(zeros, torch.zeros(4))
    assert not same_bits(zeros, torch.zeros(2, 2, dtype=torch.int32))


def test_the_bits_of_scalars_empty_and_strided_tensors_can_be_compared() -> None:
    assert same_bits(torch.tensor(1.0), torch.tensor(1.0))
    assert not same_bits(torch.tensor(1.0), torch.tensor(2.0))
    assert same_bits(torch.zeros(0, 3), torch.zeros(0, 3))
    square = torch.arange(9.0).reshape(3, 3)
    assert same_bits(square.T, square.T.contiguous())
    assert not same_bits(square.T, square)


def test_layers_that_are_given_another_number_are_not_given_the_same() -> None:
    """Else a recording of one row would serve a batch of two whose layers are told of their size."""
    ids, mask = prompts(1), torch.ones(1, 1, 3, 3)

    def given(**more: Any) -> Recording:
        return Recording(ids, ids, [((mask.clone(), None), {"rows": 1, "scale": (0.5,), **more})])

    assert given().same_arguments(given())
    assert given(cache=object()).same_arguments(given(cache=object()))
    for other in ({"rows": 2}, {"rows": None}, {"scale": (0.25,)}, {"flag": False}):
        assert not given().same_arguments(given(**other)), other
