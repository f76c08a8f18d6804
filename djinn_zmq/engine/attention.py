"""Attention weights of one layer, computed the one way that has them.

Fast attention never forms the weights, so the layer is run once more with the model's attention
implementation switched to "eager" for that call. Its masks differ too (a fast kernel is causal
without one), so the model is asked for the layer's arguments under "eager" as well. What flows into
the layer is what the model computed by itself.
"""

from typing import Any

import torch

from djinn_zmq.engine.stepping import Stepper
from djinn_zmq.errors import RequestError


def weights(
    stepper: Stepper, name: str, index: int, hidden: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """(batch, heads, positions, positions), rows are queries, of layer *index* (0-based).

    hidden: (batch, positions, hidden_size), what flows into the layer; this call's own.
    ids: int64 (batch, positions). name: the model's, for the error.
    Raises RequestError where the architecture gives none.
    """
    model: Any = stepper.model
    own = model.config._attn_implementation
    found: list[torch.Tensor] = []

    def look(module: Any, args: Any, out: Any) -> None:
        # Beside the output in a tuple; a bare tensor of this shape could be something else.
        rest = out[1:] if isinstance(out, tuple) else ()
        found.extend(one for one in rest if _is_square(one, ids))

    hooks = [module.register_forward_hook(look) for module in stepper.layers[index].modules()]
    try:
        if own != "eager":
            model.set_attn_implementation("eager")
        arguments = stepper.record(ids)
        _ask_for_weights(arguments.arguments[index][1])
        stepper.step(index, hidden, arguments)
    finally:
        for hook in hooks:
            hook.remove()
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    if not found or bool(found[-1].triu(1).any()):  # weights on what comes later: not this model's
        raise RequestError(
            f'"{name}": layer {index + 1}, a {type(stepper.layers[index]).__name__}, gives no '
            "attention weights"
        )
    return found[-1]


def _is_square(data: Any, ids: torch.Tensor) -> bool:
    if not isinstance(data, torch.Tensor) or data.ndim != 4 or not data.is_floating_point():
        return False
    batch, positions = ids.shape
    return data.shape[0] == batch and data.shape[2:] == (positions, positions)


def _ask_for_weights(kwargs: dict[str, Any]) -> None:
    """Bloom and Falcon are told by argument."""
    if "output_attentions" in kwargs:
        kwargs["output_attentions"] = True
