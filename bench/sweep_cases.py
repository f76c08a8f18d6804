"""The causal-tracing grid five ways: what `bench.sweep` compares. Each call gives the last position's
logits of some cells: (layer, position) → float32 (vocab,).
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers

import djinn_zmq as djinn
from djinn_zmq.client.model import Model

Place = tuple[int, int]
Logits = dict[Place, np.ndarray]


class Grid:
    """Every layer's output at every position. Layers as stops count, from 1."""

    def __init__(self, path: str, clean: str, corrupted: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        self.model = model.eval()
        self.layers = list(self.model.model.layers)
        self.prompts = clean, corrupted
        self.clean, self.corrupted = (
            torch.tensor([self.tokenizer(text)["input_ids"]]) for text in self.prompts
        )
        self.depth, self.positions = len(self.layers), self.clean.shape[1]
        if self.corrupted.shape != self.clean.shape:
            raise ValueError("the prompts have different lengths")
        self.cells = list(itertools.product(range(1, self.depth + 1), range(self.positions)))
        self.hidden = self._clean_hidden()

    def _clean_hidden(self) -> list[torch.Tensor]:
        """After 1 … L layers: (1, positions, hidden_size)."""
        found: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda module, args, out: found.append(out))
            for layer in self.layers
        ]
        with torch.inference_mode():
            self.model(self.clean, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def some(self, count: int) -> Iterator[list[Place]]:
        """*count* cells at a time from all over the grid, in an order without a pattern."""
        order = np.random.default_rng(0).permutation(len(self.cells))
        endless = itertools.cycle(order.tolist())
        while True:
            yield [self.cells[next(endless)] for _ in range(count)]


def plain(grid: Grid, cells: list[Place]) -> Logits:
    """One full forward a cell: the model by itself, with a hook."""
    found = {}
    for layer, position in cells:

        def patch(module: Any, args: Any, out: Any, at: Place = (layer, position)) -> Any:
            out = out.clone()
            out[:, at[1]] = grid.hidden[at[0] - 1][:, at[1]]
            return out

        hook = grid.layers[layer - 1].register_forward_hook(patch)
        with torch.inference_mode():
            out = grid.model(grid.corrupted, use_cache=False, logits_to_keep=1).logits
        hook.remove()
        found[layer, position] = out[0, -1].float().numpy()
    return found


class Nnsight:
    """The same with nnsight, as its documentation does it. Raises ImportError where it is missing."""

    def __init__(self, grid: Grid) -> None:
        if importlib.util.find_spec("nnsight") is None:
            raise ImportError("nnsight is not installed (pip install 'djinn-zmq[nnsight]')")
        from nnsight import TransformersModel  # type: ignore[import-not-found,unused-ignore]

        self.grid = grid
        # Token ids, as the other cases are given: text would be cut into tokens for every cell.
        self.ids = grid.corrupted
        self.model = TransformersModel(grid.model, task="text-generation", tokenizer=grid.tokenizer)

    def traces(self, cells: list[Place]) -> Logits:
        """One trace a cell."""
        model, grid = self.model, self.grid
        found = {}
        with torch.inference_mode():
            for layer, position in cells:
                clean = grid.hidden[layer - 1][:, position]
                with model.trace(self.ids, use_cache=False, logits_to_keep=1):
                    model.model.layers[layer - 1].output[:, position] = clean
                    logits = model.lm_head.output[:, -1].save()
                found[layer, position] = logits[0].float().numpy()
        return found

    def batch(self, cells: list[Place]) -> Logits:
        """All cells in one trace, an invoke each: one batched forward."""
        model, grid = self.model, self.grid
        with (
            torch.inference_mode(),
            model.trace(use_cache=False, logits_to_keep=1) as tracer,
        ):
            out = list().save()  # noqa: C408  nnsight gives a list its save
            for layer, position in cells:
                clean = grid.hidden[layer - 1][:, position]
                with tracer.invoke(self.ids):
                    model.model.layers[layer - 1].output[:, position] = clean
                    out.append(model.lm_head.output[:, -1])
        return {cell: row[0].float().numpy() for cell, row in zip(cells, out, strict=True)}


class Djinn:
    """The same with a served model."""

    def __init__(self, grid: Grid, model: Model) -> None:
        self.grid = grid
        self.model = model
        layers = range(1, grid.depth + 1)
        self._clean, self._corrupted = (
            model.run(ids.numpy(), save_at=layers).checkpoints
            for ids in (grid.clean, grid.corrupted)
        )

    def resumes(self, cells: list[Place]) -> Logits:
        """One resume a cell, from the corrupted run's checkpoint."""
        found = {}
        for layer, position in cells:
            patch = djinn.Patch(self._clean[layer], at=(0, position))
            out = self._corrupted[layer].resume([patch]).logits
            found[layer, position] = out[0].astype(np.float32)
        return found

    def trace(self, *, logits: str = "last", prompts: Any = None) -> Any:
        """The whole grid in one request: the client's own `Grid`."""
        clean, corrupted = prompts or (self.grid.clean.numpy(), self.grid.corrupted.numpy())
        layers = range(1, self.grid.depth + 1)
        return self.model.trace(clean, corrupted, layers, logits=logits).finish()

    def whole(self) -> Logits:
        out = self.trace().outcomes
        return {
            cell: one.logits[0].astype(np.float32)
            for cell, one in zip(self.grid.cells, out, strict=True)
        }


def apart(found: Logits, expected: Logits) -> float:
    """The largest difference of two logits, as a share of the largest logit."""
    return max(
        float(np.abs(logits - expected[cell]).max() / np.abs(expected[cell]).max())
        for cell, logits in found.items()
    )


Case = Callable[[], object]
