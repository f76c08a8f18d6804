"""Jobs: what sessions have asked an engine to do, and what has come of it so far."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from djinn_zmq.engine.jobs.plans import Plan, Start
from djinn_zmq.engine.models.caches import Account
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.places import Place
from djinn_zmq.engine.state.keeping import Entry, new_id
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import states
from djinn_zmq.wire.messages import Done, Kept, Wanted
from djinn_zmq.wire.tensors import Tensor


class Part(NamedTuple):
    """A part of an answer. A job that yields one goes on when its client has room for it."""

    meta: msgspec.Struct  # as messages.PARTS says for the op
    buffers: Sequence[bytes | memoryview] = ()


Change = Callable[[torch.Tensor], torch.Tensor]  # hidden, the job's own → hidden, edited


class Given(NamedTuple):
    """A value that is handed in where a run reaches *place*; None: a layer's input."""

    place: Place | None
    value: torch.Tensor


@dataclass(slots=True, eq=False)
class Halt:
    """What a job yields that a debugger holds: it gets no turns until that lets it go on.

    kept: for the debugger's session, of the value held, behind what it rests on. value: with which
    the job goes on; the debugger may put another in its place.
    """

    job: "Job"
    kept: list[Kept]
    value: torch.Tensor
    fixed: str = ""  # why another may not be put there
    number: int = 0
    since_ns: int = 0


Turns = Iterator[Part | Halt | None]  # a job's work: a layer each time it is asked
Halting = Generator[Halt | None, None, torch.Tensor]  # gives the value to go on with


class Attached(Protocol):
    """A debugger, as the work on its session's jobs sees it."""

    def plan(self, job: "Job", start: Start, known: Plan | None) -> Plan | None:
        """Where *job*, which has come to *start*, is to be held; None: nowhere. known: what this
        said before, which is said again as long as it holds."""

    def halt(
        self, job: "Job", value: torch.Tensor, place: Place | None, rests: Sequence[Given]
    ) -> Halting:
        """Hold *job* here. rests: inside of a layer: its input, as a value of no place, and what
        has been handed in before."""


@dataclass(slots=True, eq=False)
class EngineSession:
    """A session as the engine knows it."""

    id: int
    owner: str
    model: str
    pid: int = 0  # of its client's process on the bus, where that shares memory with the server
    asker: int = 0  # of the process that asks to hold something just now
    worked_ns: int = 0  # its clock among the others, see `turns`
    branches: dict[int, Any] = field(default_factory=dict)  # by id: where its conversations stand
    account: Account = field(default_factory=Account)  # of their keys and values
    told_nbytes: int = 0  # of these, to the server
    told_ids: np.ndarray | None = None  # the ids that it was told of last
    coming: int = 0  # ways on which what it has is brought up, because it is expected
    attached: Attached | None = None  # the debugger that holds its jobs at breakpoints


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
    given: list[Given] = field(default_factory=list)  # values to hand in where the plan says
    held: Plan | None = None  # where a debugger holds it
    edit: Change | None = None  # of what flows into the first layer
    fresh: bool = False  # it starts at the token ids
    ids_known: bool = False  # its client has them, with the checkpoint it goes on from
    sent: tuple[Tensor, ...] = ()  # in slots of its client's, which it reads
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
    def step_now(self) -> int | None:
        """Of a generation; None: it is none."""
        return None

    @property
    def can_halt(self) -> bool:
        """Would a checkpoint here hold all that its forward goes on with?"""
        return True

    def rewinder(self, layer: int) -> Callable[[], None]:
        """Puts back what running *layer* once more must find as it is now."""
        return lambda: None

    @property
    def everything_kept(self) -> list[Kept]:
        return self.kept if self.logits_kept is None else [*self.kept, self.logits_kept]

    def midway(self, layer: int) -> Any:
        """What a checkpoint after *layer* needs beside the hidden state: nothing, here."""
        return None

    def passed(self, hidden: torch.Tensor) -> None:
        """*hidden* is what flows on after `layer` layers, edits of a debugger's made."""

    def advance(self, event: str) -> None:
        self.state = states.advance(states.RUN, self.state, event)


@dataclass(slots=True, eq=False)
class DoneJob(Job):
    """Its reply says only that it is done."""

    def reply(self) -> Done:
        return Done()
