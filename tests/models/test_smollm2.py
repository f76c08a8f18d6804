"""The real model `djinn pull smollm2` brings: it knows its capitals, and where it keeps them."""

from collections.abc import Iterator

import pytest

from djinn_zmq.settings import models_dir

MODEL = models_dir() / "smollm2"

pytestmark = pytest.mark.skipif(
    not (MODEL / "djinn.json").is_file(),
    reason=f"no pulled model at {MODEL}: djinn pull smollm2",
)

FRANCE = "The capital of France is"
GERMANY = "The capital of Germany is"
SUBJECT, LAST = 3, 4  # token positions: The| capital| of| France| is


@pytest.fixture(scope="module")
def smollm2() -> Iterator["SmolLM2"]:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    # Where other work keeps a core busy, two threads that wait for each other at every small
    # product made this model 60 times slower than one does.
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield SmolLM2()
    torch.set_num_threads(threads)


class SmolLM2:
    """The model in plain transformers, as the reference."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()

    def next_token(self, text: str) -> tuple[str, float]:
        """The likeliest next token and its probability."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        chances = self.model(ids).logits[0, -1].softmax(-1)
        return self.tokenizer.decode(chances.argmax()), chances.max().item()

    def next_token_with_residual_of(self, other: str, text: str, layer: int, at: int) -> str:
        """The same, after layer *layer* (0-based) wrote at token *at* what it writes in *other*."""
        block = self.model.model.layers[layer]
        seen = []
        watch = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.next_token(other)
        watch.remove()

        def swap(module, inputs, output):
            swapped = output.clone()
            swapped[:, at] = seen[0][:, at]
            return swapped

        change = block.register_forward_hook(swap)
        try:
            return self.next_token(text)[0]
        finally:
            change.remove()


def test_it_knows_the_capital_of_france(smollm2: SmolLM2) -> None:
    token, probability = smollm2.next_token(FRANCE)
    assert token == " Paris"
    assert probability == pytest.approx(0.7725, abs=0.002)


def test_it_is_stored_in_the_dtype_that_keeps_the_weights_exact(smollm2: SmolLM2) -> None:
    assert {str(weight.dtype) for weight in smollm2.model.parameters()} == {"torch.float32"}


@pytest.mark.parametrize(("layer", "answer"), [(5, " Berlin"), (15, " Berlin"), (26, " Paris")])
def test_early_layers_keep_the_answer_at_the_subject(
    smollm2: SmolLM2, layer: int, answer: str
) -> None:
    assert smollm2.next_token_with_residual_of(GERMANY, FRANCE, layer, SUBJECT) == answer


@pytest.mark.parametrize(("layer", "answer"), [(5, " Paris"), (15, " Paris"), (26, " Berlin")])
def test_late_layers_have_moved_the_answer_to_the_last_token(
    smollm2: SmolLM2, layer: int, answer: str
) -> None:
    assert smollm2.next_token_with_residual_of(GERMANY, FRANCE, layer, LAST) == answer
