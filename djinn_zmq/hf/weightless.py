"""What transformers' models have and a served one has not in this process: modules, weights, gradients.

Whatever would read or change them raises NotServed. That goes for an assignment too: torch would take it, and
the model would compute as before.
"""

from typing import Any, NoReturn, Self

import torch
from transformers import PreTrainedModel

from djinn_zmq.client.model import Model
from djinn_zmq.errors import NotServed
from djinn_zmq.hf.caches import Elsewhere

WEIGHTS = "the weights are on the server"
REACHED = 'djinn\'s stops ("layers.3.mlp") and edits reach them there'


class Weightless(PreTrainedModel):
    """transformers' `PreTrainedModel` without all that."""

    served: Model
    architecture: type = PreTrainedModel
    _frozen = False

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise NotServed("train(): a served model is not trained")
        self.__dict__["training"] = False  # there are no children, whom torch would tell
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise NotServed("requires_grad_(): a served model is not trained")
        self.__dict__["_frozen"] = True
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """They are, on the server."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise NotServed(f"a copy of the model: {WEIGHTS}; open it once more instead")

    def __reduce__(self) -> NoReturn:
        raise NotServed(f"pickling the model: {WEIGHTS}")

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        if attn_implementation != self.config._attn_implementation:
            raise NotServed(
                f"attention {attn_implementation!r}: it is served with "
                f"{self.config._attn_implementation!r}"
            )

    def set_experts_implementation(self, experts_implementation: Any) -> None:
        own, asked = self.config._experts_implementation, experts_implementation
        if (asked.get("", own) if isinstance(asked, dict) else asked) == own:
            return
        raise NotServed(
            f"experts {asked!r}: it is served with {own!r}. On a GPU transformers' generate computes them "
            "otherwise for its steps: leave the outputs on the CPU, where it does not"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        if exclude_embeddings:
            raise NotServed(f"num_parameters without embeddings: {WEIGHTS}")
        return 0 if only_trainable and self._frozen else self.served.info.num_parameters

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        return self.served.info.nbytes

    @property
    def base_model(self) -> NoReturn:
        """Not the model itself, as transformers says of one without: it gives other outputs."""
        raise AttributeError  # which __getattr__ says in full

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise Elsewhere(self._absent(name)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if "served" in self.__dict__:  # it is made
            if name == "training":
                self.train(bool(value))
                return
            if name in ("loss_function", "_loss_function", "loss_type"):
                raise NotServed(
                    f"{name}: the loss is computed on the server, as the architecture does; compute "
                    "another of the logits"
                )
            part = isinstance(value, (torch.nn.Module, torch.nn.Parameter, torch.nn.Buffer))
            if part or name in ("lm_head", self.base_model_prefix):
                raise NotServed(f"assigning {self._absent(name)}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        except AttributeError:
            raise Elsewhere(f"deleting {self._absent(name)}") from None

    def _absent(self, name: str) -> str:
        return f'"{name}": a served {type(self).__name__} has no modules here, {WEIGHTS}; {REACHED}'


REFUSED: dict[str, tuple[str, ...]] = {  # why: methods
    WEIGHTS: (
        "parameters", "named_parameters", "get_parameter", "get_parameter_or_buffer", "register_parameter",
        "buffers", "named_buffers", "get_buffer", "register_buffer", "state_dict", "load_state_dict",
        "_load_from_state_dict",
        "load_adapter", "add_adapter", "save_pretrained", "push_to_hub", "get_input_embeddings",
        "set_input_embeddings", "get_output_embeddings", "set_output_embeddings",
        "resize_token_embeddings", "init_weights", "quantize", "dequantize", "generate_batch",
        "init_continuous_batching", "continuous_batching_context_manager", "to_empty", "type",
    ),
    f"a served model has no modules here, {WEIGHTS}; {REACHED}": (
        "named_modules", "children", "named_children", "get_submodule", "set_submodule", "add_module",
        "register_module", "apply", "get_decoder", "set_decoder",
    ),
    "a served model is not trained, and gives no gradients": (
        "zero_grad", "gradient_checkpointing_enable", "enable_input_require_grads",
        "register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook",
    ),
}  # fmt: skip


def _refusing(name: str, why: str) -> Any:
    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise NotServed(f"{name}(): {why}")

    refuse.__name__ = name
    return refuse


for _why, _names in REFUSED.items():
    for _name in _names:
        setattr(Weightless, _name, _refusing(_name, _why))
