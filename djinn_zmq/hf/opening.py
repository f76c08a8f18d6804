"""What a program needs of a served model before it can call it: config, tokenizer, generation config.

They are made by transformers itself, of the files that the server sends.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from djinn_zmq.client import checks
from djinn_zmq.client.model import Model
from djinn_zmq.client.server import Server, connect
from djinn_zmq.errors import NoTokenizer, ProtocolError, RequestError

GENERATION = "generation_config.json"
# By endpoint, key, and process: a forked one's is its own.
_connected: dict[tuple[str | None, str | None, int], Server] = {}


def server_of(endpoint: str | None, key: str | None) -> Server:
    """This process's connection to a server, which ends with the process; a new one where that was closed,
    or its server is gone."""
    if endpoint is not None:
        checks.text("endpoint", endpoint)
    asked = endpoint, None if key is None else str(checks.path("key", key)), os.getpid()
    server = _connected.get(asked)
    # Not by asking it: one that was started in its place would answer, and knows nothing of what was opened.
    if server is None or server.connection.closed or not server.connection.alive():
        server = _connected[asked] = connect(endpoint, key=asked[1])
    return server


def served_of(what: str, model: Any) -> Model:
    """*model* itself. Raises RequestError for what is none, naming the argument *what*."""
    if not isinstance(model, Model):
        raise RequestError(
            f"{what}={checks.shown(model)}: a model of djinn's, as server.model(name) gives it"
        )
    return model


def write_card(model: Model, folder: Path) -> str:
    """Put the files of *model*'s config and tokenizer in *folder*; gives its attention implementation."""
    files, attention = model.card()
    for name, data in files.items():
        if name in (".", "..") or "/" in name or "\0" in name:
            raise ProtocolError(f"a file named {name!r}")
        (folder / name).write_bytes(data)
    return attention


@contextmanager
def card_of(model: Model) -> Iterator[tuple[Path, str]]:
    """A directory with what `write_card` writes, as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="djinn-card-") as name:
        yield Path(name), write_card(model, Path(name))


def config_of(model: Model, name: str) -> tuple[Any, Any]:
    """(config, generation config or None) of a served model. name: what they say they are of."""
    with card_of(model) as (folder, attention):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config._attn_implementation = attention
        config.name_or_path = name
        generation = None
        if (folder / GENERATION).exists():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    config.dtype = getattr(torch, model.dtype)
    return config, generation


def tokenizer_of(model: Model | str, *, endpoint: str | None = None, key: str | None = None) -> Any:
    """transformers' tokenizer of a served model, made of the server's files.

    model: a `Model`, or a name on the server at *endpoint*, by default your own. Raises NoTokenizer.
    """
    if isinstance(model, (str, os.PathLike)):
        model = server_of(endpoint, key).model(model)
    model = served_of("model", model)
    if not model.has_tokenizer:
        raise NoTokenizer(f'"{model.name}" has no tokenizer')
    with card_of(model) as (folder, _):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = model.name
    return tokenizer
