"""The short way to the logits is taken exactly where it is the model's own."""

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.models import tails
from djinn_zmq.engine.models.stepping import Stepper, same_bits
from tests.engine.architectures import NAMES, tiny_model

# What these do behind their head: soft-capping, or a scale.
MORE_THAN_A_CHAIN = {"Gemma2", "Granite", "Cohere", "Cohere2"}


def checked(name: str, dtype: torch.dtype = torch.float32) -> Stepper:
    model = tiny_model(name, dtype)
    stepper = Stepper(model)
    stepper.check(model.config.get_text_config().vocab_size, torch.device("cpu"))
    return stepper


@pytest.mark.parametrize("name", NAMES)
def test_the_tail_gives_the_bits_of_the_models_own_for_hidden_states_of_any_size(name: str) -> None:
    stepper = checked(name)
    ids = torch.arange(12).reshape(2, 6)
    embedded = stepper.record(ids).embedded
    for scale in (1e-4, 1.0, 1e4):
        hidden = embedded * scale
        mine, own = stepper.tail(ids, hidden.clone()), stepper.own_tail(ids, hidden.clone())
        assert same_bits(mine, own)


def test_a_model_that_caps_or_scales_its_logits_keeps_its_own_tail() -> None:
    for name in NAMES:
        model = tiny_model(name, torch.bfloat16)
        stepper = Stepper(model)
        ids = torch.arange(7)[None]
        stepper.plain(ids)
        found = tails.find(model, stepper.layers, ids, same_bits)
        assert (found is None) == (name in MORE_THAN_A_CHAIN), name


def test_a_skip_around_the_layers_is_no_chain() -> None:
    model = tiny_model("Llama", torch.float32)
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: embedded.append(out))
    stepper = Stepper(model)
    ids = torch.arange(7)[None]
    model.model.norm.register_forward_pre_hook(lambda m, args: (args[0] + embedded[-1],))
    assert tails.find(model, stepper.layers, ids, same_bits) is None
