"""Attention weights of one layer, computed the one way that has them.

Fast attention never forms the weights, so the layer is run once more with the model's attention
implementation switched to "eager" for that call. Its masks differ too (a fast kernel is causal
without one), so the model is asked for the layer's arguments under "eager" as well. What flows into
the layer is what the model computed by itself.
"""

from typing import Any

import torch

from djinn_zmq.engine.models.stepping import Stepper
from djinn_zmq.errors import RequestError


def weights(
    stepper: Stepper,
    name: str,
    index: int,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    cache: Any = None,
) -> torch.Tensor:
    """(batch, heads, positions, keys), rows are queries, of layer *index* (0-based).

    keys: the positions, and before them those of the past that the layer holds.
    hidden: (batch, positions, hidden_size), what flows into the layer; this call's own.
    ids: int64 (batch, positions). name: the model's, for the error. cache: a dynamic one with the
    past, which is written to; None: there is no past.
    Raises RequestError where the architecture gives none.
    """
    model: Any = stepper.model
    own = model.config._attn_implementation
    held = 0 if cache is None else _held(cache.layers[index])
    shape = (ids.shape[1], held + ids.shape[1])
    found: list[torch.Tensor] = []

    def look(module: Any, args: Any, out: Any) -> None:
        # Beside the output in a tuple; a bare tensor of this shape could be something else.
        rest = out[1:] if isinstance(out, tuple) else ()
        found.extend(one for one in rest if _are_weights(one, len(ids), shape))

    hooks = [module.register_forward_hook(look) for module in stepper.layers[index].modules()]
    try:
        if own != "eager":
            model.set_attn_implementation("eager")
        arguments = stepper.record(ids, cache)
        _ask_for_weights(arguments.arguments[index][1])
        stepper.step(index, hidden, arguments)
    finally:
        for hook in hooks:
            hook.remove()
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    if not found or bool(
        found[-1].triu(1 + held).any()
    ):  # weights on what comes later: not this model's
        raise RequestError(
            f'"{name}": layer {index + 1}, a {type(stepper.layers[index]).__name__}, gives no '
            "attention weights"
        )
    return found[-1]


def _held(layer: Any) -> int:
    """How many positions of the past a cache's layer holds keys of."""
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else int(keys.shape[2])


def _are_weights(data: Any, batch: int, shape: tuple[int, int]) -> bool:
    if not isinstance(data, torch.Tensor) or data.ndim != 4 or not data.is_floating_point():
        return False
    return data.shape[0] == batch and data.shape[2:] == shape


def _ask_for_weights(kwargs: dict[str, Any]) -> None:
    """Bloom and Falcon are told by argument."""
    if "output_attentions" in kwargs:
        kwargs["output_attentions"] = True
