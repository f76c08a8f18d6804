"""The short way from the last layer to the logits, where a model has one.

Letting the model run its own tail means calling it, and its preamble (embedding, masks, rotary
tables) costs about a millisecond of launches on a GPU. Most models' tail is just a chain of modules,
norm then head, each fed with what the one before gave. Whether it is just that is observed, not
assumed, in one forward of the model:

    the last layer's output  is, bit for bit, what the first module is given
    each module's output     is what the next one is given
    the head's output        replaced by numbers of all magnitudes, comes out as the logits

The last line finds what is done after the head (soft-capping, scaling, a cast), which small logits
alone would not show. Where any of it does not hold, the model keeps its own tail.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Tail = Callable[[torch.Tensor, bool], torch.Tensor]  # hidden, of the last position only? → logits
Same = Callable[[torch.Tensor, torch.Tensor], bool]


class _Observer:
    """Watches one forward: what each module outside of the layers is given and gives."""

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.layers = layers
        inside = {id(module) for layer in layers for module in layer.modules()}
        self.watched = [
            module
            for module in model.modules()
            if id(module) not in inside and not any(True for _ in module.children())
        ]
        self.calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.last_hidden: torch.Tensor | None = None
        self.simple = True  # every call so far took one tensor and gave one

    def after_layer(self, module: nn.Module, args: Any, out: Any) -> None:
        self.last_hidden = out[0] if isinstance(out, tuple) else out
        self.calls.clear()

    def after_module(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.last_hidden is None:
            return
        if len(args) != 1 or kwargs or not isinstance(out, torch.Tensor):
            self.simple = False
            return
        self.calls.append((module, args[0], out))

    def hooks(self) -> list[Any]:
        return [
            self.layers[-1].register_forward_hook(self.after_layer),
            *(
                module.register_forward_hook(self.after_module, with_kwargs=True)
                for module in self.watched
            ),
        ]


def find(model: nn.Module, layers: list[nn.Module], ids: torch.Tensor, same: Same) -> Tail | None:
    """The chain of modules behind the last layer, or None where the tail is more than that.

    ids: int64 (batch, positions), of a prompt to try it with. same: compares two tensors' bits.
    """
    observer = _Observer(model, layers)
    hooks = observer.hooks()
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    chain = [module for module, _, _ in observer.calls]
    if not observer.simple or not chain or observer.last_hidden is None:
        return None
    given = observer.last_hidden
    for _, taken, out in observer.calls:
        if not same(given, taken):
            return None
        given = out
    if not _hands_on(model, chain[-1], ids, given, same):
        return None

    def tail(hidden: torch.Tensor, last: bool) -> torch.Tensor:
        for module in chain[:-1]:
            hidden = module(hidden)
        return chain[-1](hidden[:, -1:] if last else hidden)

    return tail


def _hands_on(
    model: nn.Module, head: nn.Module, ids: torch.Tensor, shaped: torch.Tensor, same: Same
) -> bool:
    """Do the head's outputs come out as the logits, whatever they are?"""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shaped.shape, generator=generator)
    numbers *= 10 ** torch.empty(shaped.shape).uniform_(-6, 4, generator=generator)
    chosen = numbers.to(device=shaped.device, dtype=shaped.dtype)
    hook = head.register_forward_hook(lambda module, args, out: chosen)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return isinstance(logits, torch.Tensor) and same(logits, chosen)
