"""A model's card: the small files beside its weights, of which transformers makes config and tokenizer.

As they are in the model's directory, or in transformers' cache of a hub id; a shape with random weights
has none, and its config is written for the occasion.
"""

import os
from pathlib import Path

from transformers.utils import cached_file

from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.shapes import PREFIX
from djinn_zmq.errors import RequestError
from djinn_zmq.settings import MIB
from djinn_zmq.wire.forwards import CardReply, File
from djinn_zmq.wire.tensors import INLINE_LIMIT, Frame, Inline, Tensor

CONFIG = "config.json"
NAMES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
PIECE = MIB  # of a file, a buffer
NBYTES_LIMIT = 48 * MIB  # of all files: they travel in one message


def of(model: ServedModel) -> tuple[CardReply, list[bytes | memoryview]]:
    """Raises RequestError where the files are more than one message carries."""
    buffers: list[bytes | memoryview] = []
    files = [File(name, _pieces(data, buffers)) for name, data in _found(model)]
    return CardReply(tuple(files), model.stepper.model.config._attn_implementation), buffers


def _found(model: ServedModel) -> list[tuple[str, bytes]]:
    source, config = model.info.source, model.stepper.model.config
    if source.startswith(PREFIX):
        return [(CONFIG, config.to_json_string(use_diff=False).encode())]
    found = []
    for name in NAMES:
        path = _path(source, name)
        if path is not None:
            found.append((name, path.read_bytes()))
    nbytes = sum(len(data) for _, data in found)
    if nbytes > NBYTES_LIMIT:
        raise RequestError(
            f'"{model.info.name}": config and tokenizer take {nbytes} bytes, more than {NBYTES_LIMIT}'
        )
    return found


def _path(source: str, name: str) -> Path | None:
    if os.path.isdir(source):
        path = Path(source) / name
        return path if path.is_file() else None
    cached = cached_file(
        source,
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if cached is None else Path(cached)


def _pieces(data: bytes, buffers: list[bytes | memoryview]) -> tuple[Tensor, ...]:
    if len(data) <= INLINE_LIMIT:
        return (Tensor("uint8", (len(data),), Inline(data)),)
    pieces = []
    for start in range(0, len(data), PIECE):
        piece = memoryview(data)[start : start + PIECE]
        buffers.append(piece)
        pieces.append(Tensor("uint8", (len(piece),), Frame(len(buffers) - 1)))
    return tuple(pieces)
