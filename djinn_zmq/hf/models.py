"""A served model in a program's hands: transformers' own class of its architecture, without weights.

`forward` asks the server and gives what the architecture's would give, the same bits; all that transformers
builds on it (`generate`, pipelines) runs in the program as ever. Whatever would need the weights here raises
NotServed.
"""

import functools
import inspect
from typing import Any, Self

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel, modeling_outputs
from transformers.modeling_outputs import CausalLMOutputWithPast

from djinn_zmq.client import checks
from djinn_zmq.client.forwards import Asked, Forwarded
from djinn_zmq.client.model import Model
from djinn_zmq.errors import NotServed, RequestError
from djinn_zmq.hf import surroundings
from djinn_zmq.hf.caches import RemoteCache
from djinn_zmq.hf.opening import config_of, served_of, server_of
from djinn_zmq.hf.tensors import flag, to_numpy, to_torch, whole
from djinn_zmq.hf.weightless import Weightless

CACHES = ("cache", "past_key_values")  # what transformers' versions call it
ASKING = ("output_", "return_", "use_")  # arguments for more outputs, or for others


class RemoteCausalLM(Weightless, GenerationMixin):
    """A served model as transformers' `PreTrainedModel`.

    served: the `Model` behind it. Its class is also its architecture's, LlamaForCausalLM say.
    device: where its outputs are put, by `to`; the served model's own is `served.device`.
    """

    def __init__(self, config: Any, served: Model) -> None:
        PreTrainedModel.__init__(self, config)
        self._place = torch.device("cpu")
        self._code: surroundings.Code
        self._as_served: dict[str, Any]  # its config
        self.served = served

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str, *, endpoint: str | None = None, key: str | None = None
    ) -> "RemoteCausalLM":
        """Model *name* of the server at *endpoint*, by default your own. Raises what `connect` and
        `Server.model` raise."""
        return cls.of(server_of(endpoint, key).model(name))

    @classmethod
    def of(cls, served: Model, name: str | None = None) -> "RemoteCausalLM":
        """The model *served* in transformers' terms. name: what it says it was loaded from."""
        served = served_of("served", served)
        config, generation = config_of(
            served, served.name if name is None else checks.text("name", name)
        )
        made: RemoteCausalLM = class_of(served.info.architecture)(config, served)
        made._code = surroundings.code_of(made.architecture, config._attn_implementation)
        if generation is not None:
            made.generation_config = generation
        made._as_served = surroundings.kept(config)
        return made.eval()

    # ---- calling it

    def call(self, given: dict[str, Any]) -> Any:
        """What the architecture's forward gives for these arguments, those not given left out.

        Raises NotServed for what a served model does not do.
        """
        config = self.config
        ids = given.pop("input_ids", None)
        cache = _one(given, CACHES)
        over_past = isinstance(cache, RemoteCache) and cache.is_initialized
        surroundings.check(self._code, self._place, self.dtype, over_past)
        surroundings.check_config(config, self._as_served)
        use_cache = _flag(given, "use_cache", getattr(config, "use_cache", True))
        hidden = given.pop("output_hidden_states", None)
        hidden = config.output_hidden_states if hidden is None else hidden
        attentions = _flag(given, "output_attentions", config.output_attentions)
        as_dict = _flag(given, "return_dict", config.return_dict)
        mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
        labels, keep = given.pop("labels", None), given.pop("logits_to_keep", 0)
        behind = given.pop("cache_position", None)
        if given.get("inputs_embeds") is not None:
            raise NotServed("inputs_embeds: a served model takes input_ids")
        if ids is None:
            raise NotServed("no input_ids: a served model takes nothing else")
        if attentions:
            raise NotServed(
                "output_attentions: the attention a server runs with forms no weights; djinn's "
                "checkpoint.attention(layer) has them"
            )
        if not isinstance(hidden, bool):  # a whole number is a layer's, to transformers
            raise NotServed(f"output_hidden_states={checks.shown(hidden)}: True or False")
        for name, value in given.items():
            off = value is False and name.startswith(ASKING)  # is_causal=False asks for much
            if value is not None and not off:
                raise NotServed(f"{name}: a served model's forward does not take it")
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise NotServed(f"attention_mask of type {type(mask).__name__}: a tensor")
        ids = to_numpy("input_ids", ids, torch.int64)
        if ids.ndim != 2:
            raise RequestError(f"input_ids of shape {ids.shape}: (batch, positions)")
        cache = self._cache(cache, use_cache)
        if behind is not None:
            start = 0 if cache is None else cache.get_seq_length()
            if to_numpy("cache_position", behind).tolist() != [*range(start, start + ids.shape[1])]:
                raise NotServed("cache_position other than right behind the cache")
        asked = Asked(
            ids,
            None if cache is None else cache.past,
            () if cache is None else tuple(cache.changes),
            None if mask is None else to_numpy("attention_mask", mask),
            None if positions is None else to_numpy("position_ids", positions, torch.int64),
            None if labels is None else to_numpy("labels", labels),
            to_numpy("logits_to_keep", keep)
            if isinstance(keep, torch.Tensor)
            else whole("logits_to_keep", keep),
            cache is not None,
            hidden,
        )
        done: Forwarded = self.served.forward(asked)
        if cache is not None:
            assert done.past is not None
            cache.take(done.past, len(ids))
        output = self._output(done, cache)
        return output if as_dict else output.to_tuple()

    def _cache(self, cache: Any, use_cache: bool) -> RemoteCache | None:
        if use_cache and self.served.info.no_sessions:
            raise NotServed(
                f'a cache: "{self.served.name}" is served without, with use_cache=False, because '
                f"{self.served.info.no_sessions}"
            )
        if cache is None:
            return RemoteCache.made(self.config) if use_cache else None
        if not use_cache:
            raise NotServed("use_cache=False with a cache")
        if not isinstance(cache, RemoteCache):
            cache = RemoteCache.adopt(cache, self.config)
        if cache.session not in (0, self.served.session_id):
            raise NotServed("a cache of another model")
        return cache

    def _output(self, done: Forwarded, cache: RemoteCache | None) -> Any:
        kind = getattr(modeling_outputs, done.kind, None) or getattr(
            inspect.getmodule(type(self).architecture), done.kind, CausalLMOutputWithPast
        )
        values: dict[str, Any] = {}
        for name, value in done.outputs.items():
            if isinstance(value, list):
                values[name] = tuple(to_torch(one, self._place) for one in value)
            else:
                values[name] = to_torch(value, self._place)
        fields = kind.__dataclass_fields__
        values[next(name for name in CACHES if name in fields)] = cache
        return kind(**values)

    def _prepare_cache_for_generation(
        self, generation_config: Any, *more: Any, **named: Any
    ) -> Any:
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise NotServed(f'cache_implementation="{asked}": a served model keeps a dynamic cache')
        return super()._prepare_cache_for_generation(generation_config, *more, **named)

    # ---- where it is, and what it is

    @property
    def device(self) -> torch.device:
        return self._place

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.served.dtype)  # type: ignore[no-any-return]

    def to(self, *args: Any, **named: Any) -> Self:
        """Have outputs on another device. Raises NotServed for another dtype than it is served in, and for
        that one where torch would cast what transformers loads in float32: rotary tables, say."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **named)
        self.check_dtype(dtype)
        if dtype not in (None, torch.float32):
            raise NotServed(
                f"casting to {dtype}: it is served so, as from_pretrained(dtype={dtype}) loads it, with tables "
                "(rotary frequencies) in float32, which torch would cast as well; leave the cast out"
            )
        if device is not None:  # "cuda" is one of them, which a tensor's own device names
            self._place = torch.empty(0, device=device).device
        return self

    def cuda(self, device: Any = None) -> Self:
        return self.to(torch.device("cuda" if device is None else device))

    def cpu(self) -> Self:
        return self.to("cpu")

    def float(self, *_: Any) -> Self:
        return self.to(torch.float32)

    def half(self, *_: Any) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def double(self) -> Self:
        return self.to(torch.float64)

    def check_dtype(self, dtype: Any) -> None:
        """Raises NotServed for another than it is served in."""
        if dtype is not None and dtype != self.dtype:
            raise NotServed(
                f'{dtype}: "{self.served.name}" is served in {self.dtype}; djinn serve --dtype says in '
                "which"
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on a server: {self.served!r}>"


@functools.cache
def class_of(architecture: str) -> type[RemoteCausalLM]:
    """RemoteCausalLM for *architecture*, a transformers class. Raises NotServed where there is none."""
    base = getattr(transformers, architecture, None)
    if not inspect.isclass(base) or not issubclass(base, GenerationMixin):
        raise NotServed(
            f"{architecture}: transformers {transformers.__version__} here has no such class that "
            "generates; the server's has"
        )
    signature = inspect.signature(base.forward)

    def forward(self: RemoteCausalLM, *args: Any, **named: Any) -> Any:
        bound = signature.bind(self, *args, **named).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
        if torch.compiler.is_compiling():  # there is nothing here to compile: ask as ever
            return torch.compiler.disable(self.call)(given | bound.get("kwargs", {}))
        return self.call(given | bound.get("kwargs", {}))

    # `generate` looks at it to find out what it may pass, and whether the head takes one position.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    names = {"forward": forward, "architecture": base, "__module__": __name__}
    return type(architecture, (RemoteCausalLM, base), names)


def _one(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value under any of *names*, taken out of *given*."""
    values = [given.pop(name) for name in names if name in given]
    return next((value for value in values if value is not None), None)


def _flag(given: dict[str, Any], name: str, default: Any) -> bool:
    """The flag *name*, taken out of *given*; *default* where there is none."""
    value = given.pop(name, None)
    return flag(name, default if value is None else value)
