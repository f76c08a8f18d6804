"""Sweeps and traces on their way: what was asked, and what has come of it so far."""

from dataclasses import dataclass, field

import torch

from djinn_zmq.engine.jobs.batches import Counted
from djinn_zmq.engine.jobs.job import Job
from djinn_zmq.wire.sweeps import Cost, Results


@dataclass(slots=True, eq=False)
class SweepJob(Job):
    """A sweep on its way."""

    results: Results = field(kw_only=True)
    total: int = field(kw_only=True)
    done: int = 0
    unchanged: int = 0
    counted: Counted = field(default_factory=Counted)

    @property
    def cost(self) -> Cost:
        branches = self.total * (len(self.ids) if type(self) is SweepJob else 1)
        full = branches * self.model.info.num_layers
        counted = self.counted
        return Cost(self.total, self.unchanged, counted.batches, counted.layers, full)


@dataclass(slots=True, eq=False)
class TraceJob(SweepJob):
    """A trace on its way. ids: int64 (2, positions): clean, corrupted."""

    layers: tuple[int, ...] = field(kw_only=True)
    positions: tuple[tuple[int, ...], ...] = field(kw_only=True)
    base: torch.Tensor | None = None  # (2, vocab): the logits of both
