"""Loading models from directories, whole and broken, and what a served model takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import djinn_zmq
from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.models import loading
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import same_bits
from djinn_zmq.errors import DjinnError, ModelRefused, NoTokenizer, PromptError, UnknownModel
from djinn_zmq.wire.messages import Load
from tests.engine.architectures import VOCAB_SIZE, prompts, tiny_model

TINY = Path(djinn_zmq.__file__).parent / "models" / "tiny"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"


def load(directory: Any, dtype: str = "auto") -> ServedModel:
    return loading.load(Load("it", str(directory), dtype), Cpu(), lambda *_: None)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a float32 Llama and no tokenizer."""
    path = tmp_path_factory.mktemp("written")
    tiny_model("Llama").save_pretrained(path)
    return path


@pytest.fixture
def broken(written: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return shutil.copytree(written, tmp_path / "broken")


@pytest.fixture(scope="module")
def without_tokenizer(written: Path) -> ServedModel:
    return load(written)


@pytest.fixture(scope="module")
def tiny() -> ServedModel:
    return load(TINY)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})


def sentence_of(error: type[DjinnError], directory: Any, dtype: str = "auto") -> str:
    """What a load is refused with; one line, and nothing that only a programmer would read."""
    with pytest.raises(error) as refused:
        load(directory, dtype)
    assert type(refused.value) is error
    text = str(refused.value)
    assert text and "\n" not in text and len(text) < 400
    assert "Traceback" not in text and 'File "' not in text
    return text


# ---- what is told while it loads, and of what was loaded


def test_the_stages_of_a_load_are_told_with_the_size(written: Path) -> None:
    told: list[tuple[str, int, int]] = []
    loading.load(Load("it", str(written), "auto"), Cpu(), lambda *stage: told.append(stage))
    stages, done, totals = zip(*told, strict=True)
    assert stages[0].startswith("it: reading weights (") and stages[0].endswith("KiB)")
    assert stages[1:] == ("it: checking that stops are exact", "it: reading its tokenizer")
    assert (done, set(totals)) == ((0, 1, 2), {3})


def test_the_embedded_model_is_served_with_its_tokenizer(tiny: ServedModel) -> None:
    assert tiny.info.has_tokenizer
    assert (tiny.info.num_layers, tiny.info.hidden_size, tiny.info.dtype) == (4, 64, "bfloat16")
    ids = tiny.encode(("the capital of france is",))
    assert ids.dtype == np.int64 and ids.shape == (1, 5)
    assert tiny.pieces(ids[0]) == ("the", "capital", "of", "france", "is")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_keeps_the_dtype_that_is_stored(tmp_path: Path, stored: torch.dtype) -> None:
    model = tiny_model("Llama", stored)
    model.save_pretrained(tmp_path)
    served = load(tmp_path)
    assert served.info.dtype == str(stored).removeprefix("torch.")
    for own, kept in zip(model.parameters(), served.stepper.model.parameters(), strict=True):
        assert same_bits(own, kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_dtype_that_is_asked_for_converts_the_weights(tmp_path: Path, dtype: str) -> None:
    model = tiny_model("Llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    served = load(tmp_path, dtype)
    assert served.info.dtype == dtype
    asked = getattr(torch, dtype)
    for own, kept in zip(model.parameters(), served.stepper.model.parameters(), strict=True):
        assert same_bits(own.to(asked), kept)


@pytest.mark.parametrize("dtype", ["float99", "int64", "nn", ""])
def test_a_dtype_that_weights_cannot_have_is_refused_with_those_they_can(
    written: Path, dtype: str
) -> None:
    text = sentence_of(ModelRefused, written, dtype)
    assert text == f'dtype "{dtype}": allowed are auto, float16, bfloat16, float32, float64'


def test_a_config_that_asks_for_tuples_and_all_hidden_states_makes_no_difference(
    broken: Path, without_tokenizer: ServedModel
) -> None:
    change_config(broken, return_dict=False, output_hidden_states=True, output_attentions=True)
    ids = prompts(2)
    assert same_bits(load(broken).stepper.plain(ids), without_tokenizer.stepper.plain(ids))


def test_a_model_with_fewer_positions_than_the_self_check_takes_is_served(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=4, vocab_size=VOCAB_SIZE
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load(tmp_path).info.max_positions == 4


# ---- a model without a tokenizer


def test_text_for_a_model_without_a_tokenizer_is_refused_by_its_name(
    without_tokenizer: ServedModel,
) -> None:
    assert not without_tokenizer.info.has_tokenizer
    with pytest.raises(NoTokenizer, match='"it" has no tokenizer: send token ids'):
        without_tokenizer.encode(("text",))
    with pytest.raises(NoTokenizer):
        without_tokenizer.pieces(np.array([1, 2]))


def test_ids_are_served_without_a_tokenizer(without_tokenizer: ServedModel) -> None:
    ids = prompts(3)
    without_tokenizer.check_ids(ids.numpy())
    expected = tiny_model("Llama")(input_ids=ids, use_cache=False).logits
    assert same_bits(without_tokenizer.stepper.plain(ids), expected)


# ---- prompts


def test_prompts_of_one_length_make_a_batch(tiny: ServedModel) -> None:
    ids = tiny.encode(("the capital of france is", "the capital of germany is"))
    assert ids.shape == (2, 5)
    tiny.check_ids(ids)


def test_prompts_of_different_lengths_are_refused_with_their_lengths(tiny: ServedModel) -> None:
    with pytest.raises(PromptError, match="2, 5 tokens.*the same number; Model.batch runs them"):
        tiny.encode(("the capital of france is", "the capital"))


@pytest.mark.parametrize("texts", [(), ("",), ("", "")])
def test_no_text_is_an_empty_prompt(tiny: ServedModel, texts: tuple[str, ...]) -> None:
    with pytest.raises(PromptError, match="an empty prompt cannot be run"):
        tiny.check_ids(tiny.encode(texts))


@pytest.mark.parametrize("shape", [(0,), (), (1, 0), (0, 4), (3,), (1, 2, 3)])
def test_ids_that_are_no_batch_of_prompts_are_refused(
    tiny: ServedModel, shape: tuple[int, ...]
) -> None:
    with pytest.raises(PromptError, match="token ids of shape"):
        tiny.check_ids(np.zeros(shape, np.int64))


@pytest.mark.parametrize("number", [-1, VOCAB_SIZE, 2**63 - 1, -(2**63)])
def test_an_id_out_of_range_is_refused_with_the_range(
    without_tokenizer: ServedModel, number: int
) -> None:
    ids = np.array([[1, number, 2]])
    with pytest.raises(PromptError, match=f'token id {number}: "it" has ids 0 to 98'):
        without_tokenizer.check_ids(ids)


def test_the_first_and_the_last_id_are_served(without_tokenizer: ServedModel) -> None:
    without_tokenizer.check_ids(np.array([[0, VOCAB_SIZE - 1]]))


def test_a_prompt_may_be_as_long_as_the_model_has_positions(
    without_tokenizer: ServedModel,
) -> None:
    without_tokenizer.check_ids(np.zeros((2, 64), np.int64))
    with pytest.raises(PromptError, match='65 tokens: "it" takes at most 64'):
        without_tokenizer.check_ids(np.zeros((2, 65), np.int64))


def test_a_batch_may_have_as_many_tokens_as_fit_a_message(without_tokenizer: ServedModel) -> None:
    without_tokenizer.check_ids(np.zeros((2048, 64), np.int64))
    with pytest.raises(PromptError, match="131136 tokens in a batch: at most 131072"):
        without_tokenizer.check_ids(np.zeros((2049, 64), np.int64))


# ---- directories that hold no whole model


@pytest.mark.parametrize("left", [0, 5, 1000, 30_000])
def test_truncated_weights_are_refused(broken: Path, left: int) -> None:
    path = broken / WEIGHTS
    path.write_bytes(path.read_bytes()[:left])
    sentence_of(UnknownModel, broken)


def test_a_directory_without_weights_is_refused(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    assert "no file named model.safetensors" in sentence_of(UnknownModel, broken)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    sentence_of(UnknownModel, tmp_path)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    sentence_of(UnknownModel, tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{nope", "[1]", "\x00", '{"model_type": 7}', "{}"])
def test_a_config_that_is_none_is_refused(broken: Path, text: str) -> None:
    (broken / CONFIG).write_text(text)
    sentence_of(UnknownModel, broken)


def test_an_architecture_nobody_knows_is_refused_by_its_name(broken: Path) -> None:
    change_config(broken, model_type="nonesuch")
    assert "`nonesuch`" in sentence_of(UnknownModel, broken)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": "three"}, {"num_attention_heads": 5}, {"hidden_act": "none"}]
)
def test_a_config_that_makes_no_model_is_refused_with_the_reason(
    broken: Path, changes: dict[str, Any]
) -> None:
    change_config(broken, **changes)
    sentence_of(UnknownModel, broken)


def test_a_weight_that_is_missing_is_not_made_up(broken: Path) -> None:
    change_weights(broken, lambda weights: weights.pop(A_WEIGHT))
    assert sentence_of(ModelRefused, broken) == f"its files lack 1 of its weights, {A_WEIGHT} first"


def test_layers_that_are_missing_are_not_made_up(broken: Path) -> None:
    change_config(broken, num_hidden_layers=5)
    assert "its files lack 18 of its weights" in sentence_of(ModelRefused, broken)


def test_a_weight_of_another_shape_is_refused_with_both_shapes(broken: Path) -> None:
    change_weights(broken, lambda weights: weights.update({A_WEIGHT: torch.zeros(20, 32)}))
    text = sentence_of(ModelRefused, broken)
    assert text == f"its weight {A_WEIGHT} has shape (20, 32), its config needs (48, 32)"


@pytest.mark.timeout(10)  # transformers would wait 15 s for an answer at a prompt
def test_code_that_comes_with_a_model_is_not_run(broken: Path) -> None:
    change_config(
        broken,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (broken / "own.py").write_text(f"open({str(broken / 'ran')!r}, 'w')")
    assert "custom code" in sentence_of(UnknownModel, broken)
    assert not (broken / "ran").exists()


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        ("{nope", None),
        ("{}", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        (None, '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        ('{"version": "1.0", "model": {"type": "Odd"}}', None),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_and_not_left_out(
    broken: Path, tokenizer: str | None, config: str | None
) -> None:
    for name, text in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        if text is not None:
            (broken / name).write_text(text)
    assert sentence_of(ModelRefused, broken).startswith("its tokenizer cannot be read: ")


# ---- models that are no decoders


def _small(**more: Any) -> dict[str, Any]:
    return dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **more)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**_small(intermediate_size=48, vocab_size=VOCAB_SIZE))
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    assert "lists of 2 layers: one is needed" in sentence_of(ModelRefused, tmp_path)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB_SIZE
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "T5Config" in sentence_of(UnknownModel, tmp_path)


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**_small(intermediate_size=48, image_size=16, patch_size=8))
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert "ViTConfig" in sentence_of(UnknownModel, tmp_path)


def test_a_model_whose_own_code_fails_is_refused_with_what_it_says(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this\n  at frame 3")

    kind = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(kind, "forward", fails)
    assert sentence_of(ModelRefused, written) == "it cannot be run: no kernel for this"


@pytest.mark.parametrize("there", [True, False])
def test_where_the_hub_has_no_address_its_ids_are_looked_for_in_the_cache_alone(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Else each file is asked for again and again, and the engine does nothing else meanwhile."""
    asked = []

    def resolve(*_: Any) -> list:
        if not there:
            raise OSError("Name or service not known")
        return []

    def read(*_: Any, local_files_only: bool, **__: Any) -> None:
        asked.append(local_files_only)
        raise OSError("not there")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(UnknownModel, match="not there"):
        loading.load(Load("it", "some/model", "auto"), Cpu(), lambda *_: None)
    assert asked == [not there]
