"""What the embedded model is known to do, held with plain transformers.

Layers are counted as everywhere in the project: 0 is the embedding output, 4 is after the last.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("rich")

from tools.train_tiny import (
    COUNTRIES,
    DEFAULT_OUTPUT,
    NAMES,
    build_tokenizer,
    capital_of,
    documents,
)

MEGABYTE = 1_000_000
PROMPT = "the capital of {} is"
SUBJECT, LAST = -2, -1
LAYERS = range(5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """At these sizes a second one only waits, and where other work keeps its core busy, long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEFAULT_OUTPUT, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(
        DEFAULT_OUTPUT, dtype="auto", local_files_only=True
    ).eval()


def ids_of(tokenizer, texts: list[str]):
    """Return int64 (texts, words); the texts must have equally many words."""
    return tokenizer(texts, return_tensors="pt").input_ids


def word_ids(tokenizer, words: list[str]):
    return torch.tensor(tokenizer.convert_tokens_to_ids(words))


def next_word_probabilities(model, ids):
    """Return float32 (texts, vocabulary), for the word after each text."""
    with torch.inference_mode():
        return model(ids).logits[:, -1].float().softmax(-1)


def module_of_layer(model, layer: int):
    """Return the module whose output is the residual after *layer* layers."""
    return model.model.embed_tokens if layer == 0 else model.model.layers[layer - 1]


@contextmanager
def hook_on(model, layer: int, function) -> Iterator[None]:
    hook = module_of_layer(model, layer).register_forward_hook(function)
    try:
        yield
    finally:
        hook.remove()


def residual_after(model, ids, layer: int):
    """Return bfloat16 (texts, words, 64)."""
    seen = []
    with hook_on(model, layer, lambda _module, _args, hidden: seen.append(hidden.clone())):
        next_word_probabilities(model, ids)
    return seen[0]


def probabilities_after_swap(model, ids, source_ids, layer: int, position: int):
    """Run *ids* with the residual after *layer* at *position* taken from *source_ids*."""
    source = residual_after(model, source_ids, layer)[:, position]

    def swap(_module, _args, hidden):
        hidden = hidden.clone()
        hidden[:, position] = source
        return hidden

    with hook_on(model, layer, swap):
        return next_word_probabilities(model, ids)


def flip_rate(model, tokenizer, layer: int, position: int) -> float:
    """Return the share of country pairs whose swap gives the other one's capital.

    Each country is paired with the five that follow it in the list.
    """
    countries = list(COUNTRIES)
    pairs = [
        (countries[i - shift], countries[i]) for shift in range(1, 6) for i in range(len(countries))
    ]
    ids = ids_of(tokenizer, [PROMPT.format(country) for country, _ in pairs])
    source_ids = ids_of(tokenizer, [PROMPT.format(other) for _, other in pairs])
    expected = word_ids(tokenizer, [capital_of(other) for _, other in pairs])
    probabilities = probabilities_after_swap(model, ids, source_ids, layer, position)
    return (probabilities.argmax(-1) == expected).float().mean().item()


# what is on disk


def test_the_directory_is_at_most_one_megabyte():
    nbytes = sum(path.stat().st_size for path in DEFAULT_OUTPUT.rglob("*") if path.is_file())
    assert nbytes <= MEGABYTE


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_each_file_is_there_and_readable_by_everyone(name):
    assert (DEFAULT_OUTPUT / name).stat().st_mode & 0o444 == 0o444


def test_the_config_names_a_llama_in_bfloat16():
    config = json.loads((DEFAULT_OUTPUT / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["num_hidden_layers"] == 4


def test_every_stored_tensor_is_bfloat16():
    with safetensors.safe_open(DEFAULT_OUTPUT / "model.safetensors", "pt") as stored:
        names = stored.keys()
        dtypes = {stored.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"}


# the words


def test_the_tokenizer_is_a_fast_one(tokenizer):
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)


def test_letter_case_makes_no_difference(tokenizer):
    upper = tokenizer("The capital of France is").input_ids
    assert upper == tokenizer("the capital of france is").input_ids


def test_every_word_and_every_mark_is_one_token(tokenizer):
    words = tokenizer.tokenize("Mary went out. Then, John")
    assert words == ["mary", "went", "out", ".", "then", ",", "john"]
    assert len(tokenizer("the capital of france is .").input_ids) == 6


def test_an_unknown_word_is_unk(tokenizer):
    ids = tokenizer("the capital of atlantis is").input_ids
    assert ids.count(tokenizer.unk_token_id) == 1
    assert ids[3] == tokenizer.unk_token_id


def test_the_stored_words_are_those_the_text_uses(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_no_generated_document_has_an_unknown_word(tokenizer):
    for text in islice(documents(seed=3), 500):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


# the text


def test_the_same_seed_gives_the_same_text():
    assert list(islice(documents(seed=7), 300)) == list(islice(documents(seed=7), 300))


def test_another_seed_gives_another_text():
    assert list(islice(documents(seed=7), 300)) != list(islice(documents(seed=8), 300))


# what it knows


def test_every_capital_is_the_surest_answer(model, tokenizer):
    ids = ids_of(tokenizer, [PROMPT.format(country) for country in COUNTRIES])
    expected = word_ids(tokenizer, [capital_of(country) for country in COUNTRIES])
    probabilities = next_word_probabilities(model, ids)
    assert torch.equal(probabilities.argmax(-1), expected)
    assert probabilities.gather(1, expected[:, None]).min() > 0.9


@pytest.mark.parametrize("giver", ["first", "second"])
def test_the_drink_goes_to_the_one_who_does_not_give_it(model, tokenizer, giver):
    pairs = list(itertools.permutations(NAMES, 2))
    texts, receivers = [], []
    for first, second in pairs:
        gives, receives = (first, second) if giver == "first" else (second, first)
        texts.append(f"{first} and {second} went out . then {gives} gave a drink to")
        receivers.append(receives)
    probabilities = next_word_probabilities(model, ids_of(tokenizer, texts))
    right = probabilities.argmax(-1) == word_ids(tokenizer, receivers)
    assert right.float().mean() > 0.98


def test_generation_ends_the_sentence(model, tokenizer):
    ids = ids_of(tokenizer, ["The capital of France is"])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == "paris ."


# where it knows it


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_early_swap_at_the_subject_makes_paris_berlin(model, tokenizer, layer):
    france = ids_of(tokenizer, [PROMPT.format("france")])
    germany = ids_of(tokenizer, [PROMPT.format("germany")])
    probabilities = probabilities_after_swap(model, france, germany, layer, SUBJECT)[0]
    assert tokenizer.decode(probabilities.argmax()) == "berlin"


@pytest.mark.parametrize("layer", [3, 4])
def test_a_late_swap_makes_paris_berlin_at_the_last_word_only(model, tokenizer, layer):
    france = ids_of(tokenizer, [PROMPT.format("france")])
    germany = ids_of(tokenizer, [PROMPT.format("germany")])
    at_subject = probabilities_after_swap(model, france, germany, layer, SUBJECT)[0]
    at_last = probabilities_after_swap(model, france, germany, layer, LAST)[0]
    assert tokenizer.decode(at_subject.argmax()) == "paris"
    assert tokenizer.decode(at_last.argmax()) == "berlin"


def test_every_pair_of_countries_crosses_over_between_layers_2_and_3(model, tokenizer):
    at_subject = [flip_rate(model, tokenizer, layer, SUBJECT) for layer in LAYERS]
    at_last = [flip_rate(model, tokenizer, layer, LAST) for layer in LAYERS]
    assert min(at_subject[:3]) > 0.99 and max(at_subject[3:]) < 0.01, at_subject
    assert max(at_last[:3]) < 0.01 and min(at_last[3:]) > 0.99, at_last


@pytest.mark.parametrize(
    ("layer", "position", "receiver"),
    [(2, 7, "mary"), (2, -1, "john"), (3, 7, "john"), (3, -1, "mary")],
)
def test_a_swapped_giver_turns_the_gift_around_between_layers_2_and_3(
    model, tokenizer, layer, position, receiver
):
    sentence = "mary and john went out . then {} gave a drink to"  # the giver is word 7
    ids, source_ids = (ids_of(tokenizer, [sentence.format(name)]) for name in ("mary", "john"))
    probabilities = probabilities_after_swap(model, ids, source_ids, layer, position)[0]
    assert tokenizer.decode(probabilities.argmax()) == receiver


def test_the_model_card_says_how_to_make_it_again():
    card = (DEFAULT_OUTPUT / "README.md").read_text()
    assert "python -m tools.train_tiny" in card and "Apache-2.0" in card
