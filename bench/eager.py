"""Baseline: plain PyTorch that keeps everything on the device. `python -m bench.eager`."""

from bench.cases import INDEPENDENT, WHOLE, Found, Timed
from bench.config import only
from bench.plain import Plain

NAME = "eager"
REST = "layers N+1..L and head"
FORWARD = "whole forward"
KEEPING = "whole forward that keeps every layer"


def cases(plain: Plain, layers: list[int]) -> Found:
    """The layers that any resume has to run, on an activation that never left; and what keeping
    all of them costs the forward."""
    found: Found = [
        Timed(NAME, REST, layer, lambda layer=layer: plain.from_layer(layer)) for layer in layers
    ]
    found.append(Timed(NAME, FORWARD, INDEPENDENT, plain.forward, group=WHOLE))
    found.append(Timed(NAME, KEEPING, INDEPENDENT, plain.forward_keeping_all, group=WHOLE))
    return found


if __name__ == "__main__":
    only(NAME)
