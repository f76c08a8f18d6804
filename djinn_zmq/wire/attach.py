"""Attaching: a second client stops what a session runs, looks, edits and lets it go on.

A debugger speaks in a session of its own, on the same model; what is kept at a stop is that session's.
"""

import msgspec

from djinn_zmq.wire.edits import Edit
from djinn_zmq.wire.ops import Op, message
from djinn_zmq.wire.stops import Break
from djinn_zmq.wire.tensors import Tensor
from djinn_zmq.wire.tiers import Kept

BEGUN = "attached"  # the kind of the first part, with which nothing is held

# ---- a debugger → server → engine


class Attach(msgspec.Struct, **message(Op.ATTACH)):
    """From now on, forwards of *target* that begin stop at *breaks*. *target* is a session of the
    same owner. Answered in parts, a stop each; the reply comes when it is over."""

    target: int
    breaks: tuple[Break, ...]


class Stopped(msgspec.Struct, **message(Op.ATTACH)):
    """A part of an ATTACH's answer: a run is held, until a GO_ON.

    With *number* 0 nothing is held: *kind* is BEGUN, or does not stop and passes the breakpoints.
    """

    number: int
    request: int  # of the program's
    kind: str  # "run", "resume", "generate", …
    run: int
    layer: int  # layers executed
    step: int  # of a generation; -1: of a run
    before: Tensor  # int64 (1, positions): the conversation's tokens before the forward's own
    ids: Tensor  # int64 (batch, positions): the forward's own
    checkpoints: tuple[Kept, ...]  # of the value held, behind what it rests on inside a layer


class Detached(msgspec.Struct, **message(Op.ATTACH)):
    stops: int
    reason: str  # why it is over


class Breaks(msgspec.Struct, **message(Op.BREAKS)):
    """Other breakpoints for what *request*, an ATTACH, is attached to."""

    request: int
    breaks: tuple[Break, ...]


class GoOn(msgspec.Struct, **message(Op.GO_ON)):
    """Let what is held at a stop go on, with *hidden* in its place where given, then *edits*."""

    stop: int
    hidden: Tensor | None
    edits: tuple[Edit, ...]


class Runs(msgspec.Struct, **message(Op.RUNS)):
    """What does the header's session run now?"""


class RunInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request of a session that is not answered yet."""

    request: int
    kind: str  # "run", "resume", "generate", "sweep", …
    state: str  # "queued", "running", "held": by a debugger; "waiting": for its client to read
    layer: int  # layers executed
    step: int  # of a generation; -1: of what has none
    batch: int
    positions: int
    age_s: float
    stop: int  # the number of the stop that holds it; 0: none


class RunsReply(msgspec.Struct, **message(Op.RUNS)):
    runs: tuple[RunInfo, ...]
    debugger: int  # the session that is attached to it; 0: none


# ---- server ↔ engine


class LetGo(msgspec.Struct, **message(Op.LET_GO)):
    """From the server: the client of the header's session is gone. What it holds goes on."""


class Tell(msgspec.Struct, **message(Op.TELL)):
    """From the server: is anybody there who wants to know of runs that begin, stop and end?"""

    runs: bool


class Happened(msgspec.Struct, **message(Op.HAPPENED)):
    """From an engine: something to be told in the header's session's name."""

    kind: str
    text: str
    elapsed_ns: int
