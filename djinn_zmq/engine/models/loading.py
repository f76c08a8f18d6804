"""Loading models: weights, tokenizer, and the check without which none is served."""

import logging
import os
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import msgspec
import numpy as np
import torch
import transformers

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.models import cached, shapes
from djinn_zmq.engine.models.stepping import Stepper
from djinn_zmq.errors import ModelRefused, NoTokenizer, PromptError, UnknownModel
from djinn_zmq.memory.files import facts_of
from djinn_zmq.settings import format_bytes
from djinn_zmq.wire.messages import IDS_LIMIT, Load, ModelInfo

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]  # stage, done, total
STAGES = 3
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(slots=True, eq=False)
class ServedModel:
    info: ModelInfo
    stepper: Stepper
    tokenizer: Any  # transformers' PreTrainedTokenizerBase, or None
    device: torch.device
    ends: tuple[int, ...] = ()  # tokens behind which its generations end

    @property
    def facts(self) -> dict[str, str]:
        """What a checkpoint's file says of its model, so that no other takes it for its own."""
        return facts_of(self.info)

    def encode(self, texts: tuple[str, ...], *, begins: bool = True) -> np.ndarray:
        """Prompts of one length to token ids, int64 (batch, positions).

        begins: with the tokens that the tokenizer puts before and behind a whole text.

        Raises NoTokenizer, and PromptError where the prompts come out at different lengths.
        """
        self._need_tokenizer()
        if not texts:
            raise PromptError("neither text nor token ids: an empty prompt cannot be run")
        rows = [self.tokenizer(text, add_special_tokens=begins)["input_ids"] for text in texts]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise PromptError(
                f"the prompts have {', '.join(map(str, lengths))} tokens: prompts of one batch "
                "must have the same number; Model.batch runs them each by itself"
            )
        return np.array(rows, np.int64).reshape(len(rows), lengths[0])

    def pieces(self, ids: np.ndarray) -> tuple[str, ...]:
        """Each id's own piece of text; ids int64 (n,)."""
        self._need_tokenizer()
        return tuple(self.tokenizer.decode([int(number)]) for number in ids)

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise NoTokenizer(
                f'"{self.info.name}" has no tokenizer: send token ids, an int array of shape '
                "(positions,) or (batch, positions)"
            )

    def check_ids(self, ids: np.ndarray) -> None:
        """Raises PromptError for ids the model cannot take."""
        if ids.ndim != 2 or 0 in ids.shape:
            raise PromptError(f"token ids of shape {ids.shape}: an empty prompt cannot be run")
        if ids.size > IDS_LIMIT:
            raise PromptError(f"{ids.size} tokens in a batch: at most {IDS_LIMIT} fit a message")
        limit = self.info.max_positions
        if limit and ids.shape[1] > limit:
            raise PromptError(f'{ids.shape[1]} tokens: "{self.info.name}" takes at most {limit}')
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.info.vocab_size:
            raise PromptError(
                f'token id {low if low < 0 else high}: "{self.info.name}" has ids 0 to '
                f"{self.info.vocab_size - 1}"
            )


def load(asked: Load, on: Device, report: Report) -> ServedModel:
    """Load and check a model. Raises UnknownModel, or ModelRefused with the reason."""
    device = on.torch
    size = _weights_size(asked.source)
    known = f" ({format_bytes(size)})" if size else ""
    report(f"{asked.name}: reading weights{known}", 0, STAGES)
    # A directory is all there is; only a hub id may look further. Code that comes with a model is
    # not run, and nobody is asked at a prompt whether it should be.
    near = Path(asked.source).is_dir() or not _hub_has_an_address()
    local = {"local_files_only": near, "trust_remote_code": False}
    if asked.source.startswith(shapes.PREFIX):
        shape = asked.source.removeprefix(shapes.PREFIX)
        model = shapes.make(shape, _dtype(asked.dtype), device)
    else:
        model = _weights(asked, local)
    report(f"{asked.name}: checking that stops are exact", 1, STAGES)
    try:
        model.to(device).eval()
        model.config.return_dict = True  # where a stored config says false, there is no .logits
        info = _info(asked, model, device)
        stepper = Stepper(model, on.reproducibly)
        checked = stepper.check(info.vocab_size, device, info.max_positions)
        no_sessions = cached.check(stepper, info.vocab_size, device, info.max_positions)
    except ModelRefused:
        raise
    except Exception as exc:  # the model's own code may raise anything
        _log.warning("%s cannot be run", asked.name, exc_info=True)
        raise ModelRefused(f"it cannot be run: {_sentence(exc)}") from exc
    report(f"{asked.name}: reading its tokenizer", 2, STAGES)
    made_up = asked.source.startswith(shapes.PREFIX)
    tokenizer = None if made_up else _tokenizer(asked.source, local)
    info = msgspec.structs.replace(
        info, check=checked, no_sessions=no_sessions, has_tokenizer=tokenizer is not None
    )
    return ServedModel(info, stepper, tokenizer, device, _ends(model))


def _ends(model: Any) -> tuple[int, ...]:
    """The tokens that end a text, as the model's own generation config has them."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def _weights(asked: Load, local: dict[str, bool]) -> Any:
    """The model with every one of its weights out of its files.

    Raises UnknownModel for what cannot be read, ModelRefused where weights are missing: transformers
    would make them up.
    """
    dtype = _dtype(asked.dtype)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            asked.source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of here, by name
            **local,
        )
    except Exception as exc:  # a config class, a reader of a file format may raise anything
        raise UnknownModel(_sentence(exc)) from exc
    model, found = loaded
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise ModelRefused(
            f"its weight {name} has shape {tuple(stored)}, its config needs {tuple(needed)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelRefused(f"its files lack {len(missing)} of its weights, {missing[0]} first")
    return model


def _info(asked: Load, model: Any, device: torch.device) -> ModelInfo:
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    parameters = list(model.parameters())
    return ModelInfo(
        name=asked.name,
        source=asked.source,
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=embeddings.num_embeddings,
        max_positions=getattr(config, "max_position_embeddings", None) or 0,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        nbytes=sum(parameter.nbytes for parameter in parameters),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        has_tokenizer=False,
        check="",
    )


def _dtype(name: str) -> Any:
    if name != "auto" and name not in DTYPES:
        raise ModelRefused(f'dtype "{name}": allowed are auto, {", ".join(DTYPES)}')
    return "auto" if name == "auto" else DTYPES[name]


def _tokenizer(source: str, local: dict[str, bool]) -> Any:
    """The tokenizer beside the weights, or None: such a model is served for token ids."""
    if Path(source).is_dir():
        files = os.listdir(source)
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
            return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **local)
    except Exception as exc:  # a tokenizer's reader may raise anything, bare Exceptions included
        raise ModelRefused(f"its tokenizer cannot be read: {_sentence(exc)}") from exc


def _hub_has_an_address() -> bool:
    """Where its name leads nowhere (no network, say), a hub id is looked for in the cache alone:
    huggingface_hub would try again for 20 seconds for each file, and nobody has a turn meanwhile."""
    if urllib.request.getproxies():  # who resolves names then is the proxy
        return True
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _weights_size(source: str) -> int:
    folder = Path(source)
    if not folder.is_dir():
        return 0
    return sum(
        file.stat().st_size
        for pattern in ("*.safetensors", "*.bin")
        for file in folder.glob(pattern)
    )


def _sentence(exc: BaseException) -> str:
    """What *exc* says, in one line."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    if not lines:
        return type(exc).__name__
    # "Validation error for field 'x':" and "not in dir. Checked:" go on in the next line.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(exc, (KeyError, AttributeError, TypeError)):
        text = f"{type(exc).__name__}: {text}"
    return text
