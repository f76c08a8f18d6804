"""Many branches as the rows of one batch: rows join at their layer, and go on together.

    layer      0 ──── 1 ──── 2 ──── … ──── L ── tail (last position)
    rows            +n₁    +n₂

A layer reads its weights once for all rows, and no row runs a layer that lies before its own edit.
The rows of a batch are not bit for bit those of a batch of one: kernels round otherwise for another
shape, as they do for the plain model.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from djinn_zmq.engine.models.caches import Working
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import Recording
from djinn_zmq.errors import SweepTooLarge
from djinn_zmq.settings import MIB, format_bytes

BATCH_NBYTES = 512 * MIB  # of one batch's activations, where more is free
ROWS_LIMIT = 1024
TOKENS_LIMIT = 4096  # of one batch: a layer of it should not keep others waiting for long

Joining = Callable[[int], torch.Tensor | None]  # layers executed → rows that begin there
Step = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(slots=True, eq=False)
class Counted:
    layers: int = 0  # executed, once a row
    batches: int = 0


class Rows:
    """Recordings for batches of one prompt's rows, however many."""

    def __init__(self, model: ServedModel, one: Recording, free: bool | None = None) -> None:
        """one: of the prompt itself, int64 (batch, positions). free: what `free` has been found to
        be for this model and length."""
        self._stepper = model.stepper
        self._one = one
        self._by_count: dict[int, Recording] = {1: one}
        # Most models hand their layers what does not depend on the batch: then one serves all.
        self.free = one.same_arguments(self.recording(2)) if free is None else free

    def begin(self, count: int) -> None:
        """A batch of *count* branches comes: nothing is to be made ready."""

    def recording(self, count: int) -> Recording:
        """For *count* copies of the prompt."""
        found = self._by_count.get(count)
        if found is None:
            found = self._stepper.record(self._one.ids.repeat(count, 1))
            self._by_count[count] = found
        return found

    def step(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._stepper.step(index, hidden, self.serving(hidden))

    def serving(self, hidden: torch.Tensor) -> Recording:
        return self._one if self.free else self.recording(len(hidden) // len(self._one.ids))

    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocab): the last position's."""
        count = len(hidden) // len(self._one.ids)
        ids = self._one.ids.repeat(count, 1)
        return self._stepper.tail(ids, hidden, last=True)[:, -1]


class PastRows:
    """Rows that go on from one past, each batch of them with a cache of its own."""

    def __init__(self, model: ServedModel, ids: torch.Tensor, open: Callable[[], Working]) -> None:
        """ids: int64 (1, positions), those behind the past. open: makes a cache for one row."""
        self._stepper = model.stepper
        self._ids = ids
        self._open = open
        self._recording: Recording

    def begin(self, count: int) -> None:
        working = self._open()
        working.spread(count)
        self._ids = self._ids[:1].repeat(count, 1)
        self._recording = self._stepper.record(self._ids, working.cache)

    def step(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return self._stepper.step(index, hidden, self._recording)

    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocab): the last position's."""
        return self._stepper.tail(self._ids, hidden, last=True)[:, -1]


def through(
    rows: Rows | PastRows, joining: Joining, first: int, last: int, counted: Counted, step: Step
) -> Generator[None, None, torch.Tensor]:
    """Logits (rows, vocab) of all that join from *first* on; yields before each layer."""
    hidden: torch.Tensor | None = None
    counted.batches += 1
    for layer in range(first, last + 1):
        new = joining(layer)
        if new is not None:
            hidden = new if hidden is None else torch.cat([hidden, new])
        if layer < last and hidden is not None:
            yield
            hidden = step(layer, hidden)
            counted.layers += len(hidden)
    assert hidden is not None
    yield
    return rows.tail(hidden)


def rows_at_once(
    model: ServedModel,
    batch: int,
    positions: int,
    asked: int,
    free: int,
    past_nbytes: int = 0,
    held_nbytes: int = 0,
) -> int:
    """How many branches of (batch, positions) one batch may hold.

    asked: bytes that the caller allows; 0: no word. free: bytes that are free on the device.
    past_nbytes: keys and values that each goes on from. held_nbytes: of what is free, what stays beside all
    batches until the end.
    Raises SweepTooLarge, with sizes, where not even one fits.
    """
    limit = min(asked or BATCH_NBYTES, max(0, free - held_nbytes) // 2)
    each = batch * _row_nbytes(model, positions) + past_nbytes
    if each > limit:
        beside = f", beside {format_bytes(held_nbytes)} of hidden states" if held_nbytes else ""
        raise SweepTooLarge(
            f"one branch of {batch} × {positions} tokens takes about {format_bytes(each)}{beside}: "
            f"{format_bytes(limit)} may be used, {format_bytes(free)} are free"
        )
    most = min(ROWS_LIMIT, TOKENS_LIMIT // positions) // batch
    return max(1, min(most, limit // each))


def hidden_nbytes(model: ServedModel, positions: int) -> int:
    """Of one hidden state (1, positions, hidden_size)."""
    plain: Any = model.stepper.model
    width: int = plain.config.get_text_config().hidden_size
    return positions * width * int(plain.dtype.itemsize)


def _row_nbytes(model: ServedModel, positions: int) -> int:
    """About what one row takes while it is in a layer, and behind the last."""
    config: Any = model.stepper.model.config.get_text_config()  # type: ignore[union-attr, operator]
    size = max(4, math.ceil(model.info.nbytes / max(1, model.info.num_parameters)))
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = max(wide) if isinstance(wide, (list, tuple)) else wide
    layer = positions * (6 * config.hidden_size + 3 * wide) * size
    attention = 2 * getattr(config, "num_attention_heads", 1) * positions**2 * size
    return layer + attention + 3 * 8 * model.info.vocab_size
