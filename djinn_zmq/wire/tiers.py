"""Where checkpoints are, and what is asked about that: move, hold, bring back, hints, events."""

import msgspec

from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.tensors import Device, Tensor

TIERS = ("device", "host", "disk")  # the fastest first


class Kept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor kept on the server: a checkpoint's hidden state, or a reply's logits."""

    id: int
    session: int
    run: int
    layer: int  # layers executed before it; LOGITS, BRANCH (negative): not a checkpoint
    tensor: Tensor  # hidden: (batch, positions, hidden_size)
    past: int = 0  # positions whose keys and values it goes on from: they live with the engine
    place: str = ""  # the path of the module whose value it is; "": between two layers
    base: int = 0  # inside a layer: the kept input of that layer, or of the tail; else 0
    tiers: tuple[str, ...] = ("host",)  # that hold a copy, the fastest first


class TierInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tier of one engine, in bytes. A checkpoint counts in every tier that has a copy."""

    engine: int
    name: str  # "device", "host", "disk"
    limit: int
    used: int
    checkpoints: int


# ---- client → server


class Where(msgspec.Struct, **message(Op.WHERE)):
    """Where are these kept tensors of the session now?"""

    ids: tuple[int, ...]


class WhereReply(msgspec.Struct, **message(Op.WHERE)):
    kept: tuple[Kept, ...]


class Claim(msgspec.Struct, **message(Op.CLAIM)):
    """Checkpoints of the asker's that came back from the disk when the server started, of the
    session's model. Those named become the session's; none named: tell which there are."""

    ids: tuple[int, ...]


class ClaimReply(msgspec.Struct, **message(Op.CLAIM)):
    kept: tuple[Kept, ...]
    ids: tuple[Tensor, ...]  # of those claimed, each int64 (batch, positions)


# "run", "stop" and "resume" of runs that no debugger holds are told only while somebody listens: each
# would wake the server.
EVENT_KINDS = ("engine", "session", "run", "stop", "resume", "evict", "prefetch", "write")


class Event(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Something that happened. number: counted up, without a gap."""

    number: int
    unix_s: float
    kind: str  # one of EVENT_KINDS
    session: int  # 0: none's
    text: str  # for people
    nbytes: int
    elapsed_ns: int


class Events(msgspec.Struct, **message(Op.EVENTS)):
    """What happened after event *after*, as far as it is still known and the asker's to know."""

    after: int


class EventsReply(msgspec.Struct, **message(Op.EVENTS)):
    """Events behind the last one are published at *endpoint* ("*": at the host that was asked), under
    SCOPE/KIND, with *scope* for the asker's own, "all" for everybody's."""

    events: tuple[Event, ...]
    endpoint: str
    scope: str


class Published(msgspec.Struct, **message(Op.EVENTS)):
    """An event as it is published. before: the number of the one before under this topic."""

    event: Event
    before: int


# ---- client → server → engine


class Move(msgspec.Struct, **message(Op.MOVE)):
    """Checkpoints down to *tier* (evict), or up to it (prefetch). Answered when they are there; with an error
    that names it where one was released meanwhile, and the others are there."""

    ids: tuple[int, ...]
    tier: str  # "device", "host", "disk"; "": up to the fastest that there is
    down: bool


class MoveReply(msgspec.Struct, **message(Op.MOVE)):
    kept: tuple[Kept, ...]
    spans: Spans


class Hold(msgspec.Struct, **message(Op.HOLD)):
    """Keep a checkpoint in *tier*, "host" or "device", while a client's view of it lives.

    copy: not the checkpoint itself but a copy of it on the device, which the client may change and
    send as a tensor.
    """

    checkpoint: int
    tier: str
    copy: bool


class Handle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A slab of an engine's device memory, as CUDA IPC opens it."""

    uuid: str  # of the device
    data: bytes  # cudaIpcMemHandle_t
    nbytes: int
    offset: int  # of the slot in it, in bytes
    epoch: int  # the engine's process; another one's slabs are others


class HoldReply(msgspec.Struct, **message(Op.HOLD)):
    hold: int  # to RELEASE it by
    tensor: Tensor
    handle: Handle | None  # for the device tier
    spare: Device | None = None  # with a copy: see RunReply


class Away(msgspec.Struct, **message(Op.AWAY)):
    """A hint: the session will not be back for so long; 0: it is about to come back."""

    expected_s: float


class AwayReply(msgspec.Struct, **message(Op.AWAY)):
    pass


class Restore(msgspec.Struct, **message(Op.RESTORE)):
    """Make a checkpoint of what a file held. ids: int64 (batch, positions)."""

    layer: int
    hidden: Tensor  # (batch, positions, hidden_size)
    ids: Tensor


class RestoreReply(msgspec.Struct, **message(Op.RESTORE)):
    kept: Kept
    spans: Spans


# ---- server ↔ engine


class Unclaimed(msgspec.Struct, **message(Op.UNCLAIMED)):
    """From the server: files of a server of before, which no session has claimed, take so many bytes of
    what the engine may have on the disk."""

    nbytes: int


class Shelve(msgspec.Struct, **message(Op.SHELVE)):
    """From the server, which stops: end what runs, begin nothing, and give these checkpoints files, as
    many as so much time and the disk allow."""

    ids: tuple[int, ...]
    within_s: float


class Shelved(msgspec.Struct, **message(Op.SHELVE)):
    """The engine's answer: done. left: those that could have no file, and why."""

    left: tuple[tuple[int, str], ...]


class Moved(msgspec.Struct, **message(Op.MOVED)):
    """From an engine: this is where it is now. how: "evict", "prefetch" or "write" (a file)."""

    kept: Kept
    how: str
    elapsed_ns: int
