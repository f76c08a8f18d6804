"""Jobs: what sessions have asked an engine to do, and what has come of it so far."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from djinn_zmq.engine.caches import Account
from djinn_zmq.engine.keeping import Entry, new_id
from djinn_zmq.engine.models import ServedModel
from djinn_zmq.engine.plans import Plan
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import states
from djinn_zmq.wire.messages import Kept, Wanted


class Part(NamedTuple):
    """A part of an answer. A job that yields one goes on when its client has room for it."""

    meta: msgspec.Struct  # as messages.PARTS says for the op
    buffers: Sequence[bytes | memoryview] = ()


Change = Callable[[torch.Tensor], torch.Tensor]  # hidden, the job's own → hidden, edited
Turns = Iterator[Part | None]  # a job's work: a layer each time it is asked


@dataclass(slots=True, eq=False)
class EngineSession:
    """A session as the engine knows it."""

    id: int
    owner: str
    model: str
    pid: int = 0  # of its client's process, where that shares memory with the server
    worked_ns: int = 0  # its clock among the others, see `turns`
    branches: dict[int, Any] = field(default_factory=dict)  # by id: where its conversations stand
    account: Account = field(default_factory=Account)  # of their keys and values
    told_nbytes: int = 0  # of these, to the server


@dataclass(slots=True, eq=False)
class Job:
    """One run on its way: what was asked, and what has come of it."""

    session: EngineSession
    model: ServedModel
    ids: np.ndarray  # int64 (batch, positions)
    layer: int  # layers executed so far
    wanted: Wanted
    shared: bool  # the client maps arenas: large tensors may be answered as slots
    watch: Stopwatch
    stop_at: int | None = None  # the layer after which it stops in any case
    save_at: tuple[int, ...] = ()  # layers
    plan: Plan | None = None  # what else it does on the way; None: nothing
    given: torch.Tensor | None = None  # the value to hand in where the plan says
    edit: Change | None = None  # of what flows into the first layer
    fresh: bool = False  # it starts at the token ids
    stopped: bool = False
    id: int = field(default_factory=new_id)
    kept: list[Kept] = field(default_factory=list)
    state: states.Run = states.Run.QUEUED
    logits: torch.Tensor | None = None  # "all": (batch, positions, vocab); else (batch, vocab)
    logits_kept: Kept | None = None  # where they are too large for a frame
    loans: list[Entry] = field(default_factory=list)  # what it reads and made: stays till its end
    ends: list[Callable[[], None]] = field(default_factory=list)  # called at its end

    @property
    def branch(self) -> int:
        """The branch of a session that it has come to; 0: none."""
        return 0

    @property
    def everything_kept(self) -> list[Kept]:
        return self.kept if self.logits_kept is None else [*self.kept, self.logits_kept]

    def midway(self, layer: int) -> Any:
        """What a checkpoint after *layer* needs beside the hidden state: nothing, here."""
        return None

    def advance(self, event: str) -> None:
        self.state = states.advance(states.RUN, self.state, event)
