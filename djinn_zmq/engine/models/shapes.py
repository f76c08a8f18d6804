"""Models made from a shape alone, with random weights: for machines without a hub."""

from importlib import resources
from typing import Any

import torch
import transformers
import yaml

from djinn_zmq.errors import UnknownModel

PREFIX = "random:"  # a source "random:NAME" names a shape instead of a directory
SEED = 0


def names() -> list[str]:
    return sorted(_shapes())


def config_of(name: str) -> Any:
    """Its transformers configuration, with the dtype of its weights. Raises UnknownModel."""
    shapes = _shapes()
    if name not in shapes:
        raise UnknownModel(f'no shape "{name}": there are {", ".join(sorted(shapes))}')
    fields = dict(shapes[name])
    stored = getattr(torch, fields.pop("dtype"))
    return transformers.AutoConfig.for_model(**fields, dtype=stored)


def make(name: str, dtype: Any, device: torch.device) -> Any:
    """A model of the shape *name*, its weights drawn on *device* from a fixed seed.

    dtype: a torch dtype, or "auto" for the shape's own. Raises UnknownModel with the names there are.
    """
    config = config_of(name)
    stored = config.dtype
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=stored if dtype == "auto" else dtype
        )


def _shapes() -> dict[str, dict[str, Any]]:
    text = (resources.files("djinn_zmq") / "models" / "shapes.yaml").read_text()
    return yaml.safe_load(text)
