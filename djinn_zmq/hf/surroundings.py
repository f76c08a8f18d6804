"""What is about a model and changes what a plain one computes: the library's code, torch's hooks and modes, the config.

A program may replace a layer's `forward`, or an attention function, hook every module, or set another precision
for a block. A served model computes elsewhere, where none of that is. So it is looked for at each call, and
refused by name.
"""

import copy
import functools
import inspect
import itertools
import operator
import re
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch.nn.modules import module as modules
from torch.utils._device import DeviceContext
from transformers import DynamicCache, GenerationConfig, activations, cache_utils, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from djinn_zmq.client import checks
from djinn_zmq.errors import NotServed
from djinn_zmq.hf.weightless import REACHED

# What of a config says how a forward answers or what generate looks for, not what a forward computes.
ANSWERING = frozenset({
    "use_cache", "output_hidden_states", "output_attentions", "return_dict", "pad_token_id",
    "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type",
})  # fmt: skip
ORIGIN = frozenset({"_name_or_path", "transformers_version", "architectures", "_commit_hash"})
# Of whose modules the code of a model is: the libraries, and what their files of models import.
ROOTS = sys.stdlib_module_names | {
    "torch", "transformers", "numpy", "accelerate", "deepspeed", "kernels", "mambapy", "peft", "scipy",
    "timm", "torchvision", "tqdm", "xlstm",
}  # fmt: skip
CODE = (FunctionType, BuiltinFunctionType, type, functools.partial)
METHODS = (FunctionType, staticmethod)
CACHES = (DynamicCache, DynamicLayer)
REGISTRIES = {
    "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS,
    "ALL_MASK_ATTENTION_FUNCTIONS": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
}
HOOKS = tuple(value for name, value in vars(modules).items() if name.startswith("_global_") and (
    "forward" in name or "backward" in name) and isinstance(value, dict))  # fmt: skip
KERNELS = ("flash", "math")
CUDA_KERNELS = ("mem_efficient", "cudnn")
ELSEWHERE = "a served model computes on the server, where that is not"


def check(code: "Code", device: torch.device, dtype: torch.dtype, over_past: bool = False) -> None:
    """Raises NotServed where a plain model on *device*, called now, would give something else than it gives
    by itself. over_past: it is a step behind others."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise NotServed("torch.jit.trace and torch.export: a served model cannot be recorded")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotServed(f"torch.func (vmap, grad …) around a call: {ELSEWHERE}")
    code.check()
    if any(HOOKS):
        raise NotServed(
            f"a hook on every module (register_module_forward_hook …): {ELSEWHERE}; {REACHED}"
        )
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise NotServed(
            f"torch.autocast: {ELSEWHERE}; the model is served in {dtype}: leave autocast around it"
        )
    for mode in torch.overrides._get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):
            raise NotServed(f"{type(mode).__name__}, a mode of torch's functions: {ELSEWHERE}")
    if torch._C._len_torch_dispatch_stack():
        raise NotServed(f"a TorchDispatchMode: {ELSEWHERE}")
    kernels = KERNELS + CUDA_KERNELS if device.type == "cuda" else KERNELS
    if over_past:  # the server's own steps run without cuDNN's
        kernels = tuple(kernel for kernel in kernels if kernel != "cudnn")
    enabled = (getattr(torch._C, f"_get_{kernel}_sdp_enabled")() for kernel in kernels)
    if code.attention == "sdpa" and not all(enabled):
        raise NotServed(f"sdpa_kernel, or a kernel of attention switched off: {ELSEWHERE}")
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise NotServed(
            f'float32 matmul precision "{torch.get_float32_matmul_precision()}" (or TF32): the server '
            'computes with "highest"'
        )


# ---- the library's code


class Code:
    """The code with which a plain model would compute, as it was when the first of its class was opened."""

    def __init__(self, base: type, attention: str) -> None:
        """base: transformers' class. attention: the name of its implementation.

        Raises NotServed where some of it is not the library's own.
        """
        # Flat, because hundreds of them are looked up at each call: in classes, and in modules' dicts.
        self._kinds: list[type] = []
        self._dicts: list[dict[str, Any]] = []
        self._of_kinds: list[tuple[str, Any, str]] = []  # name, value, label
        self._of_dicts: list[tuple[str, Any, str]] = []
        self._seen: set[str] = set()
        self.attention = attention
        self._chosen = [registry.get(attention) for registry in REGISTRIES.values()]
        homes = {inspect.getmodule(base), cache_utils, masking_utils}
        for name, function in zip(REGISTRIES, self._chosen, strict=True):
            _refuse_strange(f'{name}["{attention}"]', function)
            homes.add(inspect.getmodule(inspect.unwrap(function)) if function else None)
        homes.discard(None)
        for home in homes:
            self._watch_module(home, base)
        source = "".join(map(inspect.getsource, [*homes, activations]))
        named = set(re.findall(r"\w+", source))
        of_torch, functional = vars(torch), vars(torch.nn.functional)
        called = set(re.findall(r"torch\.(\w+)", source))
        self._watch_dict("torch", of_torch, called & of_torch.keys())
        self._watch_dict("torch.nn.functional", functional, named & functional.keys())
        for kind in map(vars(torch.nn).get, named):
            if inspect.isclass(kind) and issubclass(kind, torch.nn.Module):
                self._watch_class(kind, {"forward"} & vars(kind).keys())
        self._watch_class(torch.nn.Module, ["__call__", "_call_impl"])
        self._watch_class(base, ["forward"])
        self._names = (
            [name for name, _, _ in self._of_kinds],
            [name for name, _, _ in self._of_dicts],
        )
        self._values = [v for _, v, _ in self._of_kinds], [v for _, v, _ in self._of_dicts]

    def check(self) -> None:
        """Raises NotServed where some of it is another now."""
        of_kinds = functools.partial(
            map, getattr, self._kinds, self._names[0], itertools.repeat(None)
        )
        of_dicts = functools.partial(map, dict.get, self._dicts, self._names[1])
        for now, values, watched in (
            (of_kinds, self._values[0], self._of_kinds),
            (of_dicts, self._values[1], self._of_dicts),
        ):
            if not all(map(operator.is_, now(), values)):
                changed = list(map(operator.is_, now(), values)).index(False)
                raise _replaced(watched[changed][2])
        for (name, registry), value in zip(REGISTRIES.items(), self._chosen, strict=True):
            if registry.get(self.attention) is not value:
                raise _replaced(f'{name}["{self.attention}"]')

    def _watch_module(self, home: Any, base: type) -> None:
        self._watch_dict(home.__name__, vars(home), vars(home))
        for name, value in list(vars(home).items()):
            # Those that the served model's class inherits from hold in the program too.
            if inspect.isclass(value) and value not in base.__mro__:
                if issubclass(value, torch.nn.Module):
                    self._watch_class(value, {*_methods(value), "forward", "__call__"})
                elif issubclass(value, CACHES):
                    self._watch_class(value, {n for kind in value.__mro__ for n in _methods(kind)})
            elif isinstance(value, dict) and name.isupper():  # ACT2FN, ROPE_INIT_FUNCTIONS
                self._watch_dict(f"{home.__name__}.{name}", value, value)

    def _watch_class(self, kind: type, names: Iterable[str]) -> None:
        own = vars(kind).get("forward")
        if isinstance(own, FunctionType):  # of another class of the library's own
            meant = inspect.unwrap(own).__qualname__
            if meant.endswith(".forward") and meant != f"{kind.__qualname__}.forward":
                raise _replaced(f"{kind.__qualname__}.forward")
        for name in names:
            label, value = f"{kind.__module__}.{kind.__qualname__}.{name}", getattr(kind, name)
            if self._is_new(label, value):
                self._kinds.append(kind)
                self._of_kinds.append((name, value, label))

    def _watch_dict(self, label: str, space: dict[str, Any], names: Iterable[str]) -> None:
        for name in list(names):
            value, said = space[name], f"{label}.{name}"
            if isinstance(value, CODE) and self._is_new(said, value):
                self._dicts.append(space)
                self._of_dicts.append((name, value, said))

    def _is_new(self, label: str, value: Any) -> bool:
        _refuse_strange(label, value)
        known = label in self._seen
        self._seen.add(label)
        return not known


@functools.cache
def code_of(base: type, attention: str) -> Code:
    return Code(base, attention)


def _methods(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, METHODS)]


def _refuse_strange(label: str, value: Any) -> None:
    """Raises NotServed for code that is of neither library, be it around code that is."""
    while value is not None:
        value = getattr(value, "__func__", value)
        home = value.__module__ if inspect.isclass(value) else None
        if isinstance(value, FunctionType):  # not what functools.wraps says
            home = value.__globals__.get("__name__")
        if isinstance(home, str) and home.partition(".")[0] not in ROOTS:
            raise _replaced(label)
        value = getattr(value, "__wrapped__", None) or getattr(value, "func", None)


def _replaced(label: str) -> NotServed:
    return NotServed(
        f"{label} is not the library's own any more: a served model computes on the server, with what it "
        f"is there; {REACHED}"
    )


# ---- the config


def kept(config: Any) -> dict[str, Any]:
    """What `check_config` holds *config* against from now on."""
    return copy.deepcopy(vars(config))


def check_config(config: Any, served: dict[str, Any]) -> None:
    """Raises NotServed where *config* says something else of what a forward computes than when it was
    *served*: some of it a plain model reads at each call."""
    now = vars(config)
    if now == served:
        return
    for name in (*served, *(name for name in now if name not in served)):
        if name.removeprefix("_") in ANSWERING or name in ORIGIN:
            continue
        if name not in served and hasattr(_GENERATION, name):
            continue  # which generate reads, or refuses
        if name not in now or name not in served or not _equal(now[name], served[name]):
            public = name.removeprefix("_").removesuffix("_internal")
            raise NotServed(
                f"config.{public}={checks.shown(now.get(name))}, changed after the model was opened: it "
                f"is served with {checks.shown(served.get(name))}"
            )


_GENERATION = GenerationConfig()


def _equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except (TypeError, ValueError, RuntimeError):  # an array's elements, each by itself
        return False
