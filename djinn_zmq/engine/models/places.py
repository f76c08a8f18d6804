"""Where inside a model a value can be taken out and handed back: paths to modules.

What a path may name is observed, not assumed, in one forward of a short prompt: which modules are
called, between which layers, in which order, and whether they take and give tensors.

    before the layers   embedding, its norm, rotary tables
    layer 0 … L-1       self_attn, mlp, their parts
    behind the layers   final norm, head

A place is one side of one module that is called exactly once.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from djinn_zmq.engine.models.stepping import Stepper
from djinn_zmq.errors import StopError

BEFORE = -1  # the zone before layer 0; zone i is layer i; zone L is what follows the last layer
_SIDES = ("input", "output")
_HEADS = "heads"
_OUTSIDE = "outside of its layers it has"


@dataclass(frozen=True, slots=True)
class Place:
    path: str  # in full, the side too where it is the input
    zone: int
    order: int  # among all places of its zone, as they are reached
    module: nn.Module
    side: str  # "input" or "output"
    heads: int = 0  # the last axis in so many; 0: as the module has it

    @property
    def key(self) -> tuple[int, int]:
        """Sorts places as a run reaches them; between two layers it is `(layer, -1)`."""
        return self.zone, self.order


@dataclass(slots=True)
class _Calls:
    """What the forward did with one module in one zone."""

    module: nn.Module
    entered: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    takes: str = ""  # why its input is no activation; "": it is
    gives: str = ""
    width: int = 0  # last extent of its input


class Atlas:
    """The places of one model."""

    def __init__(self, stepper: Stepper, name: str, ids: torch.Tensor) -> None:
        """name: the model's, for errors. ids: int64 (batch, positions), of a prompt to watch."""
        self.name = name
        self.num_layers = stepper.num_layers
        config: Any = stepper.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self._heads: int = getattr(config, "num_attention_heads", 0)
        self._calls: dict[tuple[int, str], _Calls] = {}  # by zone, and path in the layer or model
        self._list_names = _names_of_list(stepper)
        self._aliases = _aliases(stepper)
        self._watch(stepper, ids)

    # ---- watching

    def _watch(self, stepper: Stepper, ids: torch.Tensor) -> None:
        zone, count = BEFORE, 0
        hooks: list[Any] = []
        spanning: dict[str, int] = {}

        def enter(names: tuple[int | None, str], module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal count
            layer, path = names
            if layer not in (None, zone):  # a module that layers share is seen under each
                return
            at = zone if layer is None else layer
            calls = self._calls.setdefault((at, path), _Calls(module))
            count += 1
            calls.entered.append(count)
            value = input_of(args, kwargs)
            calls.takes = _why_not(value)
            calls.width = value.shape[-1] if isinstance(value, torch.Tensor) and value.ndim else 0
            if layer is None:
                spanning[path] = at

        def leave(names: tuple[int | None, str], out: Any) -> None:
            nonlocal count
            layer, path = names
            if layer not in (None, zone):
                return
            at = zone if layer is None else layer
            count += 1
            if layer is None and spanning[path] != at:  # it holds the layers: no place
                self._calls.pop((spanning[path], path), None)
                return
            calls = self._calls[at, path]
            calls.left.append(count)
            calls.gives = _why_not(output_of(out))

        def in_layer(index: int) -> None:
            nonlocal zone
            zone = index

        def hook(module: nn.Module, names: tuple[int | None, str]) -> None:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda mod, args, kwargs: enter(names, mod, args, kwargs), with_kwargs=True
                )
            )
            hooks.append(module.register_forward_hook(lambda mod, args, out: leave(names, out)))

        inside = {id(module) for layer in stepper.layers for module in layer.modules()}
        for index, layer in enumerate(stepper.layers):
            for path, module in layer.named_modules():
                if path:
                    hook(module, (index, path))
            hooks.append(layer.register_forward_pre_hook(lambda *_, at=index: in_layer(at)))
            hooks.append(layer.register_forward_hook(lambda *_, at=index: in_layer(at + 1)))
        for path, module in stepper.model.named_modules():
            if path and id(module) not in inside:
                hook(module, (None, path))
        try:
            stepper.plain(ids)
        finally:
            for one in hooks:
                one.remove()
        behind = [
            (calls.entered[0], path)
            for (at, path), calls in self._calls.items()
            if at == self.num_layers
        ]
        if behind:  # the first thing that models do behind their layers
            self._aliases.setdefault("norm", min(behind)[1])

    # ---- from a path to places

    def layer_of(self, path: str) -> int:
        """The layer that "layers.12" names, counted from 1 as stops count. Raises StopError."""
        index, rest = self._in_layer(path)
        if index is None or rest:
            raise StopError(f'"{path}" names no layer of "{self.name}": they are {self._layers()}')
        return index + 1

    def find(self, path: str) -> list[Place | int]:
        """The places *path* names: one; or with a leading dot that of every layer which has it.

        An int is a place between two layers: "layers.12" is 13, after that layer; "layers.12.input"
        is 12. Raises StopError where there is no such place, saying what is near.
        """
        if path.startswith("."):
            found: list[Place | int] = []
            for index in range(self.num_layers):
                try:
                    found.append(self._place(index, path[1:], path))
                except StopError:
                    continue
            if not found:
                self._place(0, path[1:], path)  # says why
            return found
        index, rest = self._in_layer(path)
        if index is None:
            return [self._outside(path)]
        if rest in ("", "output"):
            return [index + 1]
        return [index] if rest == "input" else [self._place(index, rest, path)]

    def _in_layer(self, path: str) -> tuple[int | None, str]:
        """("layers.3.mlp.input") → (3, "mlp.input"); (None, path) where it is not in a layer."""
        for name in self._list_names:
            found = re.fullmatch(rf"{re.escape(name)}\.(\d+)(?:\.(.+))?", path)
            if found:
                index = int(found[1])
                if index >= self.num_layers:
                    raise StopError(f'"{path}" names no module: "{self.name}" has {self._layers()}')
                return index, found[2] or ""
        return None, path

    def _layers(self) -> str:
        return f"layers.0 to layers.{self.num_layers - 1}"

    def _outside(self, path: str) -> Place:
        bare, side, heads = _parted(path)
        full = self._aliases.get(bare)
        if full is None:
            ends = {one for _, one in self._calls if one == bare or one.endswith(f".{bare}")}
            known = {one for zone, one in self._calls if zone in (BEFORE, self.num_layers)}
            fitting = sorted(ends & known)
            full = fitting[0] if len(fitting) == 1 else bare
        zones = [zone for zone, one in self._calls if one == full]
        outside = [zone for zone in zones if zone in (BEFORE, self.num_layers)]
        if not outside:
            raise StopError(self._unknown(path, bare, self._names_outside(), _OUTSIDE))
        if heads:
            raise StopError(f'"{path}": attention heads are inside of layers')
        if len(outside) > 1:
            raise StopError(f'"{path}" is called before the layers and behind them')
        return self._made(outside[0], full, bare, side, "", path)

    def _place(self, index: int, rest: str, path: str) -> Place:
        bare, side, heads = _parted(rest)
        if (index, bare) not in self._calls:
            raise StopError(self._unknown(path, bare, self._names_in(index), f"layers.{index} has"))
        return self._made(index, bare, f"layers.{index}.{bare}", side, heads, path)

    def _made(self, zone: int, bare: str, shown: str, side: str, heads: str, path: str) -> Place:
        calls = self._calls[zone, bare]
        if heads:
            return self._of_heads(zone, bare, shown, path)
        if len(calls.left) != 1:
            raise StopError(
                f'"{path}" is called {len(calls.left)} times: which is meant is not clear'
            )
        why = calls.takes if side == "input" else calls.gives
        if why:
            raise StopError(f'"{path}": its {side} is {why}, no activation')
        order = (calls.entered if side == "input" else calls.left)[0]
        named = f"{shown}.input" if side == "input" else shown
        return Place(named, zone, order, calls.module, side)

    def _of_heads(self, zone: int, bare: str, shown: str, path: str) -> Place:
        """What flows into the attention's output projection, its heads apart."""
        module = self._calls[zone, bare].module
        parts = [
            (calls.left[-1], calls)
            for (at, name), calls in self._calls.items()
            if at == zone and name.startswith(f"{bare}.") and len(calls.left) == 1
            and getattr(calls.module, "weight", None) is not None
            and calls.module.weight.ndim == 2
        ]  # fmt: skip
        if "attention" not in type(module).__name__.lower() or not parts or not self._heads:
            raise StopError(f'"{path}": {type(module).__name__} has no attention heads')
        _, last = max(parts, key=lambda one: one[0])
        size = getattr(module, "head_dim", None) or last.width // self._heads
        if last.takes or last.width != self._heads * size:
            raise StopError(f'"{path}": its {self._heads} heads cannot be told apart')
        return Place(f"{shown}.{_HEADS}", zone, last.entered[0], last.module, "input", self._heads)

    # ---- what is near

    def _names_in(self, index: int) -> list[str]:
        return [name for zone, name in self._calls if zone == index]

    def _names_outside(self) -> list[str]:
        outside = [name for zone, name in self._calls if zone in (BEFORE, self.num_layers)]
        return list(dict.fromkeys([*self._aliases, *outside]))

    def _unknown(self, path: str, bare: str, names: list[str], where: str) -> str:
        """where: what has the *names*, as words."""
        near = difflib.get_close_matches(bare, names, 3, 0.6)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        above = bare.rpartition(".")[0]
        while above and above not in names:
            above = above.rpartition(".")[0]
        if above:
            names = [name.removeprefix(f"{above}.") for name in names if name.startswith(above)]
            where = f"{above} has"
        tops = [name for name in names if where == _OUTSIDE or "." not in name]
        shown = ", ".join(name for name in tops if name != above) or "no parts that are called"
        return f'"{path}" names no module of "{self.name}": {meant}{where} {shown}'


def _parted(path: str) -> tuple[str, str, str]:
    """The module's path, the side, and "heads" where they are meant."""
    bare, _, last = path.rpartition(".")
    if bare and last in _SIDES:
        return bare, last, ""
    if bare and last == _HEADS:
        return bare, "input", last
    return path, "output", ""


def _names_of_list(stepper: Stepper) -> list[str]:
    """What the list of layers may be called: "layers", and the model's own name for it."""
    first = stepper.layers[0]
    full = next(name for name, module in stepper.model.named_modules() if module is first)
    parts = full.split(".")[:-1]
    return list(dict.fromkeys(["layers", *(".".join(parts[at:]) for at in range(len(parts)))]))


def _aliases(stepper: Stepper) -> dict[str, str]:
    """Names that every model has: "embedding" and "head"; "norm" is added where it is seen."""
    names = {id(module): name for name, module in stepper.model.named_modules()}
    model: Any = stepper.model
    found = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {alias: names[id(module)] for alias, module in found.items() if id(module) in names}


def _why_not(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return "" if value.is_floating_point() and value.ndim else f"{value.dtype}"


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's hidden states: its first argument, or the first it is given by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def output_of(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) and out else out
