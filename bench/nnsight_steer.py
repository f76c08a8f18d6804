"""Baseline: the same edit with nnsight, where it is installed. `python -m bench.nnsight_steer`.

nnsight steers within one forward: the edit costs the whole forward again, whatever its layer.
"""

import importlib.util
from typing import Any

import torch

from bench.cases import Found, Timed
from bench.config import only
from bench.plain import Plain
from djinn_zmq.probe.results import NotMeasured

NAME = "nnsight"


def cases(plain: Plain, layers: list[int]) -> Found:
    """One forward with a vector added at the last position after layer N, to the logits."""
    if importlib.util.find_spec("nnsight") is None:
        return [NotMeasured(NAME, "nnsight is not installed (pip install 'djinn-zmq[nnsight]')")]
    from nnsight import NNsight  # type: ignore[import-not-found,unused-ignore]

    wrapped = NNsight(plain.model)
    vector = torch.zeros_like(plain.hidden[0][0, 0])
    found: Found = []
    for layer in layers:
        if layer == 0:
            found.append(NotMeasured(f"{NAME}, layer 0", "it would be an edit of the embedding"))
            continue
        found.append(
            Timed(
                NAME, "steered forward", layer, lambda at=layer: _steer(wrapped, plain, at, vector)
            )
        )
    return found


def _steer(wrapped: Any, plain: Plain, layer: int, vector: torch.Tensor) -> None:
    with wrapped.trace(plain.ids, use_cache=False):
        out = wrapped.model.layers[layer - 1].output
        out[:, -1] += vector
        logits = wrapped.lm_head.output[:, -1].save()
    assert logits is not None
    plain.wait()


if __name__ == "__main__":
    only(NAME)
