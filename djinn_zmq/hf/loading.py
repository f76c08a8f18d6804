"""The arguments of from_pretrained, where what is loaded is on a server: followed, or refused by name."""

import os
from typing import Any

import torch

from djinn_zmq.client.model import Model
from djinn_zmq.errors import NotServed
from djinn_zmq.hf.models import RemoteCausalLM

# Arguments that say where files are found and how they are read: here the server has done so.
READING = frozenset({
    "cache_dir", "force_download", "local_files_only", "token", "use_auth_token", "use_safetensors",
    "low_cpu_mem_usage", "trust_remote_code", "proxies", "resume_download", "offload_folder",
    "offload_state_dict", "offload_buffers", "max_memory", "weights_only", "ignore_mismatched_sizes",
    "code_revision", "_from_auto", "_from_pipeline", "_commit_hash", "_fast_init", "subfolder",
})  # fmt: skip
# What of a config says how a forward answers, not what it computes.
ANSWERING = frozenset({
    "use_cache", "output_hidden_states", "output_attentions", "return_dict", "pad_token_id",
    "bos_token_id", "eos_token_id",
})  # fmt: skip
ORIGIN = frozenset({"_name_or_path", "transformers_version", "architectures", "_commit_hash"})


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
        own = made.config.to_dict()
        for key, value in config.to_dict().items():
            if own.get(key) != value and key not in ORIGIN:
                named.setdefault(key, value)
    for key in ("dtype", "torch_dtype"):
        dtype = named.pop(key, None)
        if dtype not in (None, "auto"):
            made.to(_dtype(dtype))
    attention = named.pop("attn_implementation", None)
    if attention is not None:
        made.set_attn_implementation(attention)
    generation = named.pop("generation_config", None)
    if generation is not None:
        made.generation_config = generation
    for key, value in named.items():
        if key in ANSWERING:
            setattr(made.config, key, value)
        elif not any(value is one or value == one for one in _same(key, made)):
            raise NotServed(
                f'from_pretrained("{name}", {key}={value!r}): the model is served as it is; without '
                "djinn exec it can be had so"
            )
    if device is not None:
        made.to(_device(device))
    return made


def _same(key: str, made: Any) -> tuple[Any, ...]:
    """Values of an argument that change nothing."""
    if key == "revision":
        return (None, "main")
    return (getattr(made.config, key),) if hasattr(made.config, key) else (None, False, {})


def _device(device_map: Any) -> Any:
    if isinstance(device_map, dict):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise NotServed(
                f"device_map={device_map!r}: a served model's outputs are on one device"
            )
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map)


def _dtype(dtype: Any) -> Any:
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
