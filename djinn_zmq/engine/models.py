"""Loading models: weights, tokenizer, and the check without which none is served."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers

from djinn_zmq.engine.stepping import Stepper
from djinn_zmq.errors import ModelRefused, NoTokenizer, PromptError, UnknownModel
from djinn_zmq.settings import format_bytes
from djinn_zmq.wire.messages import Load, ModelInfo

Report = Callable[[str, int, int], None]  # stage, done, total
STAGES = 3


@dataclass(slots=True, eq=False)
class ServedModel:
    info: ModelInfo
    stepper: Stepper
    tokenizer: Any  # transformers' PreTrainedTokenizerBase, or None
    device: torch.device

    def encode(self, texts: tuple[str, ...]) -> np.ndarray:
        """Prompts of one length to token ids, int64 (batch, positions).

        Raises NoTokenizer, and PromptError where the prompts come out at different lengths.
        """
        self._need_tokenizer()
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise PromptError(
                f"the prompts have {', '.join(map(str, lengths))} tokens: prompts of one batch "
                "must have the same number; run them one by one"
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
        limit = self.info.max_positions
        if limit and ids.shape[1] > limit:
            raise PromptError(f'{ids.shape[1]} tokens: "{self.info.name}" takes at most {limit}')
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.info.vocab_size:
            raise PromptError(
                f'token id {low if low < 0 else high}: "{self.info.name}" has ids 0 to '
                f"{self.info.vocab_size - 1}"
            )


def load(asked: Load, device: torch.device, report: Report) -> ServedModel:
    """Load and check a model. Raises UnknownModel, or ModelRefused with the reason."""
    size = _weights_size(asked.source)
    known = f" ({format_bytes(size)})" if size else ""
    report(f"{asked.name}: reading weights{known}", 0, STAGES)
    # A directory is all there is; only a hub id may look further.
    local = {"local_files_only": Path(asked.source).is_dir()}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            asked.source, dtype=_dtype(asked.dtype), **local
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as exc:
        raise UnknownModel(_first_line(exc)) from exc
    model.to(device).eval()
    report(f"{asked.name}: checking that stops are exact", 1, STAGES)
    info = _info(asked, model, device)
    stepper = Stepper(model)
    if info.num_layers != stepper.num_layers:
        raise ModelRefused(f"its config says {info.num_layers} layers, it has {stepper.num_layers}")
    checked = stepper.check(info.vocab_size, device)
    report(f"{asked.name}: reading its tokenizer", 2, STAGES)
    tokenizer = _tokenizer(asked.source, local)
    info = msgspec.structs.replace(info, check=checked, has_tokenizer=tokenizer is not None)
    return ServedModel(info, stepper, tokenizer, device)


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
    return "auto" if name == "auto" else getattr(torch, name)


def _tokenizer(source: str, local: dict[str, bool]) -> Any:
    """The tokenizer beside the weights, or None: such a model is served for token ids."""
    if local["local_files_only"]:
        files = os.listdir(source)
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
            return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **local)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise ModelRefused(f"its tokenizer cannot be read: {_first_line(exc)}") from exc


def _weights_size(source: str) -> int:
    folder = Path(source)
    if not folder.is_dir():
        return 0
    return sum(
        file.stat().st_size
        for pattern in ("*.safetensors", "*.bin")
        for file in folder.glob(pattern)
    )


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0]
