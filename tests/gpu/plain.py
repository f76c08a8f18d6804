"""Models that a server watches over, untouched in the test's own process on the same device; and hands in them.

Long prompts, heads of 64: what Hopper takes cuDNN's attention for, whose steps over a past differ each
time. So the untouched ones run with PyTorch's own over a past, as engines do (`engine.device.cuda.Reproducibly`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import Cache

import djinn_zmq as djinn

VOCAB_SIZE = 512
LAYERS = 6
DTYPES = {"brief": torch.bfloat16, "exact": torch.float32}  # the models, by name
Change = Callable[[torch.Tensor], torch.Tensor | None]  # what is there → what is to be there


class Watched:
    """A server, and the models that it can load.

    source: by a model's name the directory that `Server.model` takes.
    """

    def __init__(self, endpoint: str, device: torch.device, folder: Path) -> None:
        self.endpoint = endpoint
        self.device = device
        self.source: dict[str, Path] = {}
        for name, dtype in DTYPES.items():
            torch.manual_seed(5)
            model = transformers.LlamaForCausalLM(_config()).to(dtype)
            self.source[name] = folder / name
            model.save_pretrained(self.source[name])

    def connect(self) -> djinn.Server:
        return djinn.connect(self.endpoint, timeout_s=60)

    @cached_property
    def brief(self) -> Any:
        return self._plain("brief")

    @cached_property
    def exact(self) -> Any:
        return self._plain("exact")

    def _plain(self, name: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.source[name], dtype="auto"
        ).eval()
        model.to(self.device)
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)
        return model

    def ids(self, *shape: int, seed: int = 1) -> np.ndarray:
        """int64, of the vocabulary."""
        return np.random.default_rng(seed).integers(3, VOCAB_SIZE, shape)

    def on_device(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids).to(self.device)


def _config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _before(model: Any, args: Any, named: dict[str, Any]) -> None:
    caches = [one for one in named.values() if isinstance(one, Cache)]
    over_past = any(isinstance(one, StaticCache) or one.get_seq_length() for one in caches)
    torch.backends.cuda.enable_cudnn_sdp(not over_past)


def _after(model: Any, args: Any, out: Any) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)


def raw(data: Any) -> bytes:
    """The bytes of a tensor, or of what numpy makes an array of."""
    if isinstance(data, torch.Tensor):
        return data.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return np.asarray(data).tobytes()


# ---- hands in them, where a stop at a number or a path would be


@contextmanager
def hands(plain: Any, changes: Mapping[int | str, Change]) -> Iterator[None]:
    """While the block lasts each change is shown what flows there, and may give another for it."""
    hooks = [_hook(*_module(plain, at), change) for at, change in changes.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def seen(plain: Any, places: list[int | str], call: Callable[[], Any]) -> dict[int | str, bytes]:
    """What flows there while *call* runs, as bytes."""
    found: dict[int | str, bytes] = {}

    def note(at: int | str) -> Change:
        def noted(value: torch.Tensor) -> None:
            found[at] = raw(value)

        return noted

    with hands(plain, {at: note(at) for at in places}):
        call()
    return found


def _module(plain: Any, at: int | str) -> tuple[Any, str, int]:
    """The module, its side, and in how many heads its last axis is."""
    if isinstance(at, int):
        return (
            (plain.model.layers[at - 1], "output", 0) if at else (plain.model.layers[0], "input", 0)
        )
    outside = {"embedding": "embed_tokens", "norm": "norm"}
    path, heads = f"model.{outside.get(at, at)}", 0
    side = "input" if path.endswith((".input", ".heads")) else "output"
    if path.endswith(".heads"):
        path, heads = path.removesuffix("heads") + "o_proj.input", 4
    return plain.get_submodule(path.removesuffix(".input")), side, heads


def _hook(module: Any, side: str, heads: int, change: Change) -> Any:
    def changed(value: torch.Tensor) -> torch.Tensor:
        new = change(value.unflatten(-1, (heads, -1)) if heads else value)
        if new is None:
            return value
        laid_out = torch.empty_strided(  # kernels may round otherwise for other strides
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        return laid_out.copy_(new.reshape(value.shape))

    def before(_: Any, args: Any, named: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), named
        first = next(iter(named))
        return args, {**named, first: changed(named[first])}

    def after(_: Any, args: Any, out: Any) -> Any:
        return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def scaled(factor: float, at: Any = ...) -> Change:
    """As djinn's Scale does it, on a value of its own."""

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[at] = (value[at].float() * factor).to(value.dtype)
        return value

    return change


def steps(plain: Any, prompt: torch.Tensor, count: int, step: int = -1, **hand: Any) -> list[bytes]:
    """The logits of a greedy generation of *count* tokens. hand: at, change: in forward *step*."""
    cache, found = transformers.DynamicCache(config=plain.config), []
    for number in range(count):
        with hands(plain, {hand["at"]: hand["change"]} if number == step else {}):
            out = plain(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(raw(out.logits[:, -1]))
        prompt = out.logits[:, -1].float().argmax(-1, keepdim=True)
    return found
