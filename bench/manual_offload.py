"""Baseline: a pinned copy in host memory and a copy back, by hand. `python -m bench.manual_offload`.

The "speed of light" of the prototype's experiment: what somebody pays who writes the CUDA calls
themselves, for one activation whose place they know. Nothing is checked, shared, named or freed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import HIDDEN, PER_CALL, PREALLOCATED, THEN, WITH_KV, Found, Timed, both_clocks
from bench.config import only
from bench.plain import Plain, kv_shape
from bench.writing import BEFORE, FIRST, rewriting
from djinn_zmq.probe.results import NotMeasured

NAME = "manual_offload"


@dataclass(slots=True)
class Pairs:
    """Tensors in host memory and where they go on the device, in the order they are copied."""

    host: list[torch.Tensor]
    device: list[torch.Tensor]

    def add(self, like: torch.Tensor, pinned: bool) -> None:
        host = torch.empty_like(like, device="cpu", pin_memory=pinned)
        host.zero_()  # touched: no page fault is measured
        self.host.append(host)
        self.device.append(torch.empty_like(like))


def cases(plain: Plain, layers: list[int]) -> Found:
    """The activation, alone and with the keys and values of layers 1..N, from host memory; the
    activation rewritten, on the clock and in front of it; and the activation with the layers that
    follow it."""
    hidden, cache = Pairs([], []), Pairs([], [])
    hidden.add(plain.hidden[0], plain.cuda)
    hidden.host[0].copy_(plain.hidden[0])
    entry = _kv_entry(plain)
    for _ in range(2 * max(layers, default=0)):
        cache.add(entry, plain.cuda)
    found: Found = []
    if not plain.cuda:
        why = "no GPU: a copy within host memory stands in its place, under the same name"
        found.append(NotMeasured(f"{NAME} from pinned memory to a GPU", why))
    for layer in layers:
        count = 2 * layer
        what = {
            HIDDEN: hidden,
            WITH_KV: Pairs(hidden.host + cache.host[:count], hidden.device + cache.device[:count]),
        }
        for kind, pairs in what.items():
            for how, copy in ((PREALLOCATED, _copy), (PER_CALL, _allocate_and_copy)):
                found += _timed(plain, layer, f"{kind}, {how}", copy, pairs)
        found += _rewritten(plain, layer)
        found.append(_whole(plain, layer, hidden))
    return found


def _rewritten(plain: Plain, layer: int) -> Found:
    """What by hand compares with an activation that is rewritten in place and resumed: the same bytes
    are written by the same call, on the clock or in front of it, as they are there."""
    pairs = Pairs([], [])
    pairs.add(plain.hidden[layer], plain.cuda)
    data = plain.hidden[layer].to("cpu", copy=True)
    write = rewriting(pairs.host[0].view(torch.uint8), data.view(torch.uint8))

    def copy() -> None:
        _copy(pairs, plain)
        plain.wait()

    def write_and_copy() -> None:
        write()
        copy()

    variant = f"{HIDDEN}, {PREALLOCATED}"
    return [
        Timed(NAME, f"{variant}, {FIRST}", layer, write_and_copy),
        Timed(NAME, f"{variant}, {BEFORE}", layer, copy, before=write),
    ]


def _whole(plain: Plain, layer: int, hidden: Pairs) -> Timed:
    """What by hand compares with a resume to the logits."""

    def call() -> None:
        _copy(hidden, plain)
        plain.from_layer(layer, hidden.device[0])

    return Timed(NAME, f"{HIDDEN}, {PREALLOCATED}, {THEN}", layer, call)


def _timed(
    plain: Plain, layer: int, variant: str, copy: Callable[..., None], pairs: Pairs
) -> Found:
    def make(**clock: object) -> Timed:
        def call() -> None:
            copy(pairs, plain)
            if not clock:
                plain.wait()

        return Timed(NAME, variant, layer, call, **clock)

    return both_clocks(make, plain.cuda)


def _copy(pairs: Pairs, plain: Plain) -> None:
    for host, device in zip(pairs.host, pairs.device, strict=True):
        device.copy_(host, non_blocking=True)


def _allocate_and_copy(pairs: Pairs, plain: Plain) -> None:
    """New memory on the device each time, from torch's caching allocator."""
    for host in pairs.host:
        if plain.cuda:
            host.to(plain.device, non_blocking=True)
        else:
            host.clone()


def _kv_entry(plain: Plain) -> torch.Tensor:
    """A tensor like one layer's keys, without values."""
    like = plain.hidden[0]
    shape = kv_shape(plain.model.config.get_text_config(), like.shape[1])
    return torch.empty(shape, dtype=like.dtype, device=like.device)


if __name__ == "__main__":
    only(NAME)
