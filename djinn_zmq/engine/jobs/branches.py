"""Where a conversation stands, as values: between two forwards (`Branch`), or within one (`Midway`).

They are immutable and share what is past, so that any of them can be gone on from any number of
times. `talks` makes new ones of old ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from djinn_zmq.engine.jobs.job import EngineSession, Job
from djinn_zmq.engine.models.caches import Past, Segment, Working
from djinn_zmq.engine.models.sampling import Sampler
from djinn_zmq.engine.models.spelling import Spelling
from djinn_zmq.engine.state.keeping import Entry
from djinn_zmq.errors import Lost, RequestError
from djinn_zmq.wire.forwards import Forward
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.talks import Generate
from djinn_zmq.wire.tensors import Inline, Tensor

NO_TENSOR = Tensor("uint8", (0,), Inline(b""))  # of a branch, which is told by its id alone


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """Where a conversation stands."""

    ids: np.ndarray  # int64 (1, positions): all tokens
    past: Past  # of the first `past.length` of them
    static: int  # positions of its static cache; 0: a dynamic one
    logits: torch.Tensor | None = None  # (1, vocab), behind the last token if the past is of all
    generator: torch.Tensor | None = None  # the sampler's state
    unspelled: int = 0  # tokens at the end that are within a character
    bound: str = ""  # why nothing but a program's forwards can go on from it


@dataclass(frozen=True, slots=True, eq=False)
class Midway:
    """A forward on its way: what a checkpoint of a session goes on with."""

    branch: Branch  # its past: before the forward; its ids: with the forward's own
    below: tuple[Segment, ...]  # what the layers executed have added
    step: int | None  # of a generation; None: of a run
    bound: str = ""  # why nothing but the forward itself can go on from it


def midway_of(entry: Entry, session: EngineSession) -> Midway:
    """What a checkpoint of a session goes on with. Raises RequestError, Lost."""
    if entry.session != session.id or entry.layer < 0:
        raise RequestError("only a checkpoint of this session can be gone on from")
    if entry.midway is None and not entry.past:
        raise RequestError(
            "a checkpoint of a plain run has no past to generate from: run its prompt in a session"
        )
    if entry.midway is None:
        raise Lost(
            f"checkpoint {entry.id:#x} goes on from the keys and values of "
            f"{entry.past} tokens, which died with their engine: run them again"
        )
    if entry.midway.bound:
        raise RequestError(entry.midway.bound)
    return entry.midway


@dataclass(slots=True, eq=False)
class TalkJob(Job):
    """A run in a session, or a generation. `ids` and `layer` are those of the forward under way."""

    start: Branch = field(kw_only=True)
    below: tuple[Segment, ...] = field(kw_only=True)  # what it starts with, besides `start.past`
    working: Working = field(init=False)  # made when it begins
    tokens: np.ndarray = field(kw_only=True)  # int64 (1, positions): the branch's, so far
    step: int | None = None
    asked: Generate | None = None
    sampler: Sampler | None = None
    spelling: Spelling | None = None
    place: str = ""  # inside of a layer, where it starts there
    begun: bool = False  # has it said a token?
    reason: str = ""
    ended: Kept | None = None  # the branch that it has come to

    @property
    def branch(self) -> int:
        return 0 if self.ended is None else self.ended.id

    @property
    def everything_kept(self) -> list[Kept]:
        logits = [] if self.logits_kept is None else [self.logits_kept]
        return [*self.kept, *logits, *([] if self.ended is None else [self.ended])]

    @property
    def step_now(self) -> int | None:
        return self.step

    @property
    def can_halt(self) -> bool:
        return self.working.past.length == self.working.length

    def rewinder(self, layer: int) -> Callable[[], None]:
        return self.working.rewinder(layer)

    def stand(self, past: Past, logits: torch.Tensor | None = None) -> Branch:
        return Branch(
            self.tokens,
            past,
            self.start.static,
            logits,
            self.start.generator if self.sampler is None else self.sampler.state(),
            0 if self.spelling is None else self.spelling.unspelled,
        )

    def midway(self, layer: int) -> Midway | None:
        if layer < 0:
            return None
        return Midway(self.stand(self.working.past), self.working.below(layer), self.step)


@dataclass(slots=True, eq=False)
class ForwardJob(TalkJob):
    """A program's own forward, see `forwards`. `ids` and `tokens` have as many rows as it asks for."""

    call: Forward = field(kw_only=True)
    arguments: dict[str, Any] = field(kw_only=True)  # of the model's forward, beside ids and cache
    wished: dict[str, Any] = field(kw_only=True)  # those that concern only what comes out
    bound: str = field(kw_only=True)  # as in Midway
    layers: list[torch.Tensor] = field(
        default_factory=list
    )  # what flowed into each and out of the last, if wanted
    outcome: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)  # as in wire.Output
    apart: dict[int, Kept] = field(default_factory=dict)  # by their place there
    kind: str = ""

    @property
    def cache(self) -> Any:
        """What the model's forward is given to keep keys and values in."""
        return self.working.cache if self.call.cached else None

    @property
    def can_halt(self) -> bool:
        return not self.call.cached or self.working.past.length == self.working.length

    def rewinder(self, layer: int) -> Callable[[], None]:
        return self.working.rewinder(layer) if self.call.cached else lambda: None

    def midway(self, layer: int) -> Midway | None:
        if layer < 0:
            return None
        if self.call.cached:
            return Midway(
                self.stand(self.working.past), self.working.below(layer), None, self.bound
            )
        return Midway(self.stand(self.start.past), (), None, self.bound) if self.bound else None

    def passed(self, hidden: torch.Tensor) -> None:
        if self.call.hidden:
            self.layers.append(hidden)
