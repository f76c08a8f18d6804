"""Baseline: have nothing kept, run the layers again. `python -m bench.recompute`."""

from bench.cases import Found, Timed, both_clocks
from bench.config import only
from bench.plain import Plain

NAME = "recompute"


def cases(plain: Plain, layers: list[int]) -> Found:
    """Layers 0..N, 0 the embedding, until the activation is there: O(N)."""
    found: Found = []
    for layer in layers:

        def make(layer: int = layer, **clock: object) -> Timed:
            wait = not clock  # the device's clock waits by itself
            return Timed(NAME, "to layer N", layer, lambda: plain.up_to(layer, wait=wait), **clock)

        found += both_clocks(make, plain.cuda)
    return found


if __name__ == "__main__":
    only(NAME)
