"""Turn a GGUF file into a model directory that transformers loads: weights, config, tokenizer.

    python -m djinn_zmq.engine.models.convert SOURCE.gguf TARGET_DIR

A process of its own, because only this room imports torch and `djinn pull` is a client.
"""

import os
import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

# A model is served in the dtype it is stored in, and float32 is the only one that keeps what the
# file says. A Q4_1 weight is q * scale + minimum with float16 scale and minimum: all 134 479 872
# quantised weights of SmolLM2-135M come out of float32 arithmetic as out of float64, while 79 % of
# all weights change in bfloat16 and 42 % in float16. It costs 538 MB instead of 269 MB. On one CPU
# thread float32 is also the faster one (128 tokens: 0.41 s against 0.58 s in bfloat16).
STORED_DTYPE = torch.float32


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model and the tokenizer in the file *source* to the new directory *target*.

    *target* appears whole or not at all. Raises FileExistsError if it is there already.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _load(source)
    # A sibling: rename is atomic only within one filesystem.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        written = Path(scratch) / target.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        os.rename(written, target)


def _load(source: Path):
    directory, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=STORED_DTYPE,
    )
    return model, tokenizer


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def main(source: Path, target: Path) -> None:
    """Write the model in the GGUF file SOURCE to the new directory TARGET."""
    transformers_logging.disable_progress_bar()
    convert_gguf(source.absolute(), target.absolute())


if __name__ == "__main__":
    main()
