"""The arguments of from_pretrained, where what is loaded is on a server: followed, or refused by name."""

import os
from typing import Any

import torch
from transformers import GenerationConfig

from djinn_zmq.client import checks
from djinn_zmq.client.model import Model
from djinn_zmq.errors import NotServed, RequestError
from djinn_zmq.hf.models import RemoteCausalLM
from djinn_zmq.hf.surroundings import ANSWERING, ORIGIN

# Arguments that say where files are found and how they are read: here the server has done so.
READING = frozenset({
    "cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "use_safetensors",
    "low_cpu_mem_usage", "trust_remote_code", "proxies", "resume_download", "offload_folder",
    "offload_state_dict", "offload_buffers", "max_memory", "weights_only", "ignore_mismatched_sizes",
    "code_revision", "_from_auto", "_from_pipeline", "_commit_hash", "_fast_init",
})  # fmt: skip
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def loaded(served: Model, name: str, named: dict[str, Any]) -> RemoteCausalLM:
    """What `from_pretrained(name, **named)` gives where *name* is *served*. Raises NotServed for what would
    make another model of it."""
    made = RemoteCausalLM.of(served, name)
    named = {key: value for key, value in named.items() if key not in READING}
    device = named.pop("device_map", None)
    config = named.pop("config", None)
    if isinstance(config, (str, os.PathLike)):
        raise NotServed(f'from_pretrained("{name}", config={config!r}): a config of another name')
    if config is not None:
        if not hasattr(config, "to_dict"):
            raise RequestError(f"config={checks.shown(config)}: a config of transformers'")
        own = made.config.to_dict()
        for key, value in config.to_dict().items():
            if key not in own and value is False:  # an argument is let be then
                raise _other(name, f"config.{key}", value)
            if own.get(key) != value and key not in ORIGIN:
                named.setdefault(key, value)
        for key in ("attn_implementation", "experts_implementation"):  # which no dict of it has
            if (value := getattr(config, f"_{key}", None)) is not None:
                named.setdefault(key, value)
    for key in ("dtype", "torch_dtype"):
        dtype = named.pop(key, None)
        if dtype is not None and not _equal(dtype, "auto"):
            made.check_dtype(_dtype(key, dtype))
    attention = named.pop("attn_implementation", None)
    if attention is not None:
        made.set_attn_implementation(attention)
    experts = named.pop("experts_implementation", None)
    if experts is not None:
        made.set_experts_implementation(experts)
    generation = named.pop("generation_config", None)
    if generation is not None:
        if not isinstance(generation, GenerationConfig):
            raise RequestError(f"generation_config={checks.shown(generation)}: a GenerationConfig")
        made.generation_config = generation
    for key, value in named.items():
        if key in ANSWERING:
            setattr(made.config, key, value)
        elif not any(value is one or _equal(value, one) for one in _same(key, made)):
            raise _other(name, key, value)
    if device is not None:
        made.to(_device(device))
    return made


def _same(key: str, made: Any) -> tuple[Any, ...]:
    """Values of an argument that change nothing."""
    if key == "revision":
        return (None, "main")
    if key == "subfolder":
        return (None, "", ".")
    return (getattr(made.config, key),) if hasattr(made.config, key) else (None, False, {})


def _other(name: str, key: str, value: Any) -> NotServed:
    return NotServed(
        f'from_pretrained("{name}", {key}={checks.shown(value)}): the model is served as it is; without '
        "djinn exec it can be had so"
    )


def _equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except (TypeError, ValueError, RuntimeError):  # an array's elements, each by itself
        return False


def _device(device_map: Any) -> Any:
    if isinstance(device_map, dict):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise NotServed(
                f"device_map={device_map!r}: a served model's outputs are on one device"
            )
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, str) and device_map in SPREAD:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise RequestError(
            f'device_map={checks.shown(device_map)}: a device, "auto", or a dict with one device'
        ) from exc


def _dtype(key: str, dtype: Any) -> torch.dtype:
    found = dtype
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise RequestError(f'{key}={checks.shown(dtype)}: a torch.dtype, its name, or "auto"')
    return found
