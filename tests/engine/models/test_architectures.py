"""Every architecture, taken apart at every layer and resumed from bytes, gives the model's own bits.

The reference is a copy made before a Stepper put its stubs in, run by transformers alone.
"""

import copy
from collections.abc import Iterator
from functools import cache

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.models import loading
from djinn_zmq.engine.models.stepping import Stepper, same_bits
from djinn_zmq.wire.messages import Load
from tests.engine.architectures import NAMES, PROMPT_LENGTH, VOCAB_SIZE, prompts, tiny_model

CPU = torch.device("cpu")
# facts of these architectures: which have layers whose masks differ from their neighbours'
MASKS_DIFFER = [
    "Ministral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Olmo3", "Cohere2", "GptOss",
]  # fmt: skip


@cache
def both(name: str, dtype: torch.dtype) -> tuple[Stepper, torch.nn.Module]:
    """A checked Stepper, and the same model untouched."""
    model = tiny_model(name, dtype)
    untouched = copy.deepcopy(model)
    stepper = Stepper(model)
    stepper.check(VOCAB_SIZE, CPU)
    return stepper, untouched


@pytest.fixture(scope="module", autouse=True)
def _forget_the_models() -> Iterator[None]:
    yield
    both.cache_clear()


def through_bytes(hidden: torch.Tensor) -> torch.Tensor:
    """A copy as a checkpoint makes it."""
    raw = bytearray(hidden.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(raw, dtype=hidden.dtype).reshape(hidden.shape)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def resumed(stepper: Stepper, ids: torch.Tensor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """Logits from *hidden*, the state after *layer* layers, on; all else recorded anew."""
    recording = stepper.record(ids)
    for index in range(layer, stepper.num_layers):
        hidden = stepper.step(index, hidden, recording)
    return stepper.tail(ids, hidden)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_from_any_layer_gives_the_models_own_bits(
    name: str, dtype: torch.dtype, batch: int
) -> None:
    stepper, untouched = both(name, dtype)
    ids = prompts(batch)
    expected = logits_of(untouched, ids)
    assert expected.dtype == dtype and expected.isfinite().all()
    recording = stepper.record(ids)
    hidden = recording.embedded.clone()
    for layer in range(stepper.num_layers + 1):
        assert hidden.shape[:2] == (batch, PROMPT_LENGTH) and hidden.ndim == 3
        checkpoint = through_bytes(hidden)
        assert same_bits(resumed(stepper, ids, layer, checkpoint), expected), f"from layer {layer}"
        if layer < stepper.num_layers:
            hidden = stepper.step(layer, hidden, recording)


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_serves_many_times(name: str) -> None:
    stepper, untouched = both(name, torch.float32)
    ids = prompts(2)
    recording = stepper.record(ids)
    expected = logits_of(untouched, ids)
    for _ in range(2):
        hidden = recording.embedded.clone()
        for index in range(stepper.num_layers):
            hidden = stepper.step(index, hidden, recording)
        assert same_bits(stepper.tail(ids, hidden), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_with_stubs_still_runs_as_itself(name: str) -> None:
    stepper, untouched = both(name, torch.float32)
    ids = prompts(2)
    expected = logits_of(untouched, ids)
    assert same_bits(logits_of(stepper.model, ids), expected)
    cached = untouched(input_ids=ids, use_cache=True).logits
    assert same_bits(stepper.model(input_ids=ids, use_cache=True).logits, cached)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_counts(name: str) -> None:
    """Else the tests above could not see a layer that was left out or changed place."""
    stepper, _ = both(name, torch.float32)
    ids = prompts(1)
    recording = stepper.record(ids)
    expected = stepper.plain(ids)
    for left_out in range(stepper.num_layers):
        hidden = recording.embedded.clone()
        for index in range(stepper.num_layers):
            if index != left_out:
                hidden = stepper.step(index, hidden, recording)
        assert not torch.allclose(stepper.tail(ids, hidden), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MASKS_DIFFER)
def test_another_layers_arguments_would_give_other_logits(name: str) -> None:
    stepper, _ = both(name, torch.float32)
    ids = prompts(1)
    recording = stepper.record(ids)
    recording.arguments.reverse()
    hidden = recording.embedded.clone()
    for index in range(stepper.num_layers):
        hidden = stepper.step(index, hidden, recording)
    assert not torch.allclose(stepper.tail(ids, hidden), stepper.plain(ids), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_from_a_directory(name: str, tmp_path) -> None:
    written = tiny_model(name, torch.bfloat16)
    written.save_pretrained(tmp_path)
    by_itself = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    served = loading.load(Load(name.lower(), str(tmp_path), "auto"), Cpu(), lambda *_: None)
    ids = prompts(2)
    assert same_bits(served.stepper.plain(ids), logits_of(by_itself, ids))
    info = served.info
    assert (info.name, info.source) == (name.lower(), str(tmp_path))
    assert info.architecture == type(written).__name__
    assert info.num_layers == written.config.num_hidden_layers == len(served.stepper.layers)
    assert (info.vocab_size, info.hidden_size) == (VOCAB_SIZE, 32)
    assert info.max_positions == (0 if name == "Bloom" else 64)
    assert (info.dtype, info.device) == ("bfloat16", "cpu")
    assert info.num_parameters == sum(weights.numel() for weights in written.parameters())
    assert info.nbytes >= 2 * info.num_parameters
    assert info.has_tokenizer is False
    assert info.no_sessions == ""
    checked, tail = info.check.split("; ")
    assert checked == "logits of 1×7 and 2×5 tokens equal bit for bit, stepped and plain"
    assert tail in ("tail: direct", "tail: its own")
