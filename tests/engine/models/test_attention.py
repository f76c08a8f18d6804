"""Attention weights of one layer are the model's own, and asking leaves no trace."""

import copy

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.models import attention
from djinn_zmq.engine.models.stepping import Stepper, same_bits
from djinn_zmq.errors import RequestError
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model

CPU = torch.device("cpu")
# Gemma 2 soft-caps, Mistral's window is shorter than the prompt, Bloom is told by argument,
# GPT-Neo's weights are computed two modules deep, GPT-OSS has sinks.
NAMES = [
    "Llama",
    "Mistral",
    "Gemma2",
    "GPTNeoX",
    "GPT2",
    "GPTJ",
    "GPTNeo",
    "OPT",
    "Bloom",
    "GptOss",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_the_model_gives_when_it_runs_eagerly(name: str) -> None:
    model = tiny_model(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    stepper = Stepper(model)
    stepper.check(VOCAB_SIZE, CPU)
    ids = prompts(2)
    expected = eager(input_ids=ids, use_cache=False, output_attentions=True).attentions
    plain, recording = stepper.plain(ids), stepper.record(ids)
    hidden = recording.embedded.clone()
    for index in range(stepper.num_layers):
        found = attention.weights(stepper, name, index, hidden.clone(), ids)
        torch.testing.assert_close(found, expected[index], atol=1e-5, rtol=1e-4)
        assert bool((found.sum(-1) <= 1 + 1e-5).all())
        hidden = stepper.step(index, hidden, recording)
    assert same_bits(stepper.plain(ids), plain)


def test_a_layer_without_attention_is_refused_by_name() -> None:
    stepper = Stepper(tiny_model("Lfm2"))
    ids = prompts(1)
    hidden = stepper.record(ids).embedded
    with pytest.raises(RequestError, match='"it": layer 1, a Lfm2DecoderLayer, gives no attention'):
        attention.weights(stepper, "it", 0, hidden.clone(), ids)
    assert attention.weights(stepper, "it", 1, hidden.clone(), ids).shape == (1, 4, 11, 11)
