"""The messages: one op, one request struct, one reply struct each. `docs/protocol.md` shows them.

Tagged array-like msgspec structs: a field's place is its name, the tag is the op, and a field too
many is refused. Ids are random or counted 64-bit numbers; 0 is never an id.
"""

from enum import IntEnum

import msgspec

from djinn_zmq.wire import attach, forwards, tiers
from djinn_zmq.wire.edits import Edit, Index
from djinn_zmq.wire.looks import Look, LookReply
from djinn_zmq.wire.ops import Op, Spans, message
from djinn_zmq.wire.stops import Wanted
from djinn_zmq.wire.sweeps import Sweep, SweepReply, Swept, Trace, Traced, TraceReply
from djinn_zmq.wire.talks import Continue, Generate, Generated, Held, Token
from djinn_zmq.wire.tensors import Device, Tensor
from djinn_zmq.wire.tiers import Kept, TierInfo

VERSION = 1
IDS_LIMIT = 1 << 17  # tokens of one forward's batch: int64, they travel in one frame of 1 MiB


class Flag(IntEnum):
    """Bits of the header's flags. Not an IntFlag: its operators cost 2 us each on every message."""

    REPLY = 1
    ERROR = 2  # with REPLY: the meta is a Failure
    PROGRESS = 4  # the meta is a Progress; the reply itself is still to come
    SHARED = 8  # the sender maps shared arenas: tensors may travel as slots
    ONE_WAY = 16  # no reply is wanted
    PART = 32  # a part of the answer; more of them, and then the reply, are still to come


# ---- what several messages carry


class ModelInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str
    source: str  # directory or hub id
    architecture: str  # the transformers class
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int  # 0: no limit known
    num_parameters: int
    nbytes: int  # of the weights
    dtype: str
    device: str
    has_tokenizer: bool
    check: str  # what the self-check at load compared
    no_sessions: str = ""  # why it cannot go on from a past exactly; "": it can


LOGITS, BRANCH = -1, -2  # in Kept.layer: a reply's logits; where a conversation stands


class EngineInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    index: int
    device: str
    state: str
    pid: int
    restarts: int
    detail: str  # what it is doing, or why it is down
    resident: int  # bytes of memory, 0 where not known


class SessionInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    id: int
    owner: str
    model: str
    state: str
    engine: int
    checkpoints: int
    nbytes: int
    waiting: int  # requests not yet answered
    age_s: float
    yours: bool
    kv: int  # bytes of keys and values, what branches share counted once
    pid: int = 0  # of its client's process, as the kernel says; 0: not on this machine
    program: str = ""  # that process's command line; yours only


class MemoryInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    limit: int  # bytes, all of them
    arenas: int  # mapped so far
    used: int  # in slots that hold something
    checkpoints: int
    tiers: tuple[TierInfo, ...] = ()
    unclaimed: int = 0  # checkpoints in files of a server of before, of no session yet
    unclaimed_nbytes: int = 0  # of their files


# ---- client → server


class Hello(msgspec.Struct, **message(Op.HELLO)):
    version: str
    pid: int


class Welcome(msgspec.Struct, **message(Op.HELLO)):
    version: str
    pid: int
    lease_path: str  # empty: no shared memory for this peer
    token: bytes  # shows on the lease socket which peer this is
    models: tuple[str, ...]
    frame_limit: int


class Ping(msgspec.Struct, **message(Op.PING)):
    pass


class Pong(msgspec.Struct, **message(Op.PING)):
    """inside_ns: from when the engine had the request until it made this answer, as a run's spans; 0 where
    the server answers."""

    state: str  # the engine's, where the ping went to one
    inside_ns: int = 0


class Status(msgspec.Struct, **message(Op.STATUS)):
    pass


class StatusReply(msgspec.Struct, **message(Op.STATUS)):
    version: str
    pid: int
    uptime_s: float
    endpoints: tuple[str, ...]
    names: tuple[str, ...]  # models that can be asked for by name
    models: tuple[ModelInfo, ...]  # models that are loaded
    engines: tuple[EngineInfo, ...]
    sessions: tuple[SessionInfo, ...]
    memory: MemoryInfo


class Open(msgspec.Struct, **message(Op.OPEN)):
    model: str


class Opened(msgspec.Struct, **message(Op.OPEN)):
    session: int
    model: ModelInfo
    engine: int  # its index


class Close(msgspec.Struct, **message(Op.CLOSE)):
    pass


class Done(msgspec.Struct, **message(Op.CLOSE)):
    """The reply that says only: done. CLOSE, RELEASE, BREAKS, GO_ON."""


class Read(msgspec.Struct, **message(Op.READ)):
    """Bytes [offset, offset + nbytes) of `kept[at]`, laid out C-contiguous."""

    id: int
    at: Index
    offset: int
    nbytes: int


class ReadReply(msgspec.Struct, **message(Op.READ)):
    dtype: str
    shape: tuple[int, ...]  # of kept[at]
    piece: Tensor  # uint8 (n,)


class Upload(msgspec.Struct, **message(Op.UPLOAD)):
    """Ask for a slot of *nbytes*; the pieces follow at once as CHUNKs with this request's id."""

    nbytes: int


class Uploaded(msgspec.Struct, **message(Op.UPLOAD)):
    id: int  # to RELEASE it by
    tensor: Tensor  # uint8 (nbytes,)


class Chunk(msgspec.Struct, **message(Op.CHUNK)):
    offset: int


class Stop(msgspec.Struct, **message(Op.STOP)):
    pass


class Stopping(msgspec.Struct, **message(Op.STOP)):
    """It stops. within_s: for which it may still write checkpoints to its state directory."""

    within_s: float


# ---- client → server → engine


class Run(msgspec.Struct, **message(Op.RUN)):
    """One forward pass over *text*, or over *ids*: int64 (batch, positions).

    edits: of what flows into the first layer.
    """

    text: tuple[str, ...]
    ids: Tensor | None
    wanted: Wanted
    edits: tuple[Edit, ...] = ()


class Resume(msgspec.Struct, **message(Op.RESUME)):
    """Go on from a checkpoint: a new branch, with *hidden* in its place where given, then *edits*.

    released: what the client lets go of at the same time, as a RELEASE that goes one way would say.
    """

    checkpoint: int
    hidden: Tensor | None
    edits: tuple[Edit, ...]
    wanted: Wanted
    released: tuple[int, ...] = ()


class RunReply(msgspec.Struct, **message(Op.RUN)):
    """What a RUN, RESUME or CONTINUE came to."""

    run: int
    state: str
    layer: int  # layers executed
    ids: Tensor | None  # int64 (batch, positions); None: those of the checkpoint it went on from
    checkpoints: tuple[Kept, ...]
    logits: Tensor | None  # "last": (batch, vocab); "all": (batch, positions, vocab)
    logits_id: int  # where the logits are kept in a slot: to READ and RELEASE; else 0
    top_values: Tensor | None  # (batch, k): logits, in the model's dtype
    top_ids: Tensor | None  # int64 (batch, k)
    top_log_norm: Tensor | None  # float64 (batch,): log of the sum of exp over all logits
    spans: Spans
    branch: int = 0  # of a session's finished run: what can go on from here
    # Where the RESUME's hidden named a spare: the next. A spare is an empty slot of the engine's, in the slab
    # of one that was lent to be written into (HOLD). What a client copies there and sends is taken over.
    spare: Device | None = None


class Release(msgspec.Struct, **message(Op.RELEASE)):
    ids: tuple[int, ...]


class Cancel(msgspec.Struct, **message(Op.CANCEL)):
    request: int


class Cancelled(msgspec.Struct, **message(Op.CANCEL)):
    found: bool


class More(msgspec.Struct, **message(Op.MORE)):
    """One way: as many more parts of *request*'s answer are taken as the header's credit says."""

    request: int


class Tokens(msgspec.Struct, **message(Op.TOKENS)):
    """Text to ids (where *ids* is None), or each id to its own piece of text."""

    text: str
    ids: Tensor | None


class TokensReply(msgspec.Struct, **message(Op.TOKENS)):
    ids: Tensor  # int64 (n,)
    pieces: tuple[str, ...]


# ---- server ↔ engine


class Ready(msgspec.Struct, **message(Op.READY)):
    device: str
    pid: int
    device_memory: int  # bytes that its device tier may have


class Load(msgspec.Struct, **message(Op.LOAD)):
    name: str
    source: str
    dtype: str  # "auto": as stored


class Loaded(msgspec.Struct, **message(Op.LOAD)):
    model: ModelInfo


class Enter(msgspec.Struct, **message(Op.ENTER)):
    owner: str
    model: str
    pid: int = 0  # of the client's process, where that shares memory with the server


class Leave(msgspec.Struct, **message(Op.LEAVE)):
    pass


class Keep(msgspec.Struct, **message(Op.KEEP)):
    """These exist now. *ids* (int64 (batch, positions)) is what their run was made of; None: what those of
    the session's last KEEP were."""

    ids: Tensor | None
    kept: tuple[Kept, ...]


class Drop(msgspec.Struct, **message(Op.DROP)):
    ids: tuple[int, ...]


class Adopt(msgspec.Struct, **message(Op.ADOPT)):
    """As Keep, in the other direction: what a new engine takes over.

    facts: what the files of these say of their model.
    """

    ids: Tensor
    kept: tuple[Kept, ...]
    facts: tuple[tuple[str, str], ...] = ()


# ---- beside any request


class Progress(msgspec.Struct, **message(Op.PROGRESS)):
    stage: str
    done: int
    total: int  # 0: not known
    held: bool | None = (
        None  # by a debugger, from now on: the deadline stands still; False: it goes on
    )


class Failure(msgspec.Struct, **message(Op.FAILURE)):
    code: str
    text: str


REQUESTS: dict[int, type[msgspec.Struct]] = {
    Op.HELLO: Hello,
    Op.PING: Ping,
    Op.STATUS: Status,
    Op.OPEN: Open,
    Op.CLOSE: Close,
    Op.READ: Read,
    Op.UPLOAD: Upload,
    Op.CHUNK: Chunk,
    Op.STOP: Stop,
    Op.RUN: Run,
    Op.RESUME: Resume,
    Op.RELEASE: Release,
    Op.CANCEL: Cancel,
    Op.TOKENS: Tokens,
    Op.LOOK: Look,
    Op.SWEEP: Sweep,
    Op.TRACE: Trace,
    Op.WHERE: tiers.Where,
    Op.CLAIM: tiers.Claim,
    Op.EVENTS: tiers.Events,
    Op.MOVE: tiers.Move,
    Op.HOLD: tiers.Hold,
    Op.AWAY: tiers.Away,
    Op.RESTORE: tiers.Restore,
    Op.MORE: More,
    Op.CONTINUE: Continue,
    Op.GENERATE: Generate,
    Op.HELD: Held,
    Op.READY: Ready,
    Op.LOAD: Load,
    Op.ENTER: Enter,
    Op.LEAVE: Leave,
    Op.KEEP: Keep,
    Op.DROP: Drop,
    Op.ADOPT: Adopt,
    Op.MOVED: tiers.Moved,
    Op.FORWARD: forwards.Forward,
    Op.CARD: forwards.Card,
    Op.ATTACH: attach.Attach,
    Op.BREAKS: attach.Breaks,
    Op.GO_ON: attach.GoOn,
    Op.RUNS: attach.Runs,
    Op.LET_GO: attach.LetGo,
    Op.UNCLAIMED: tiers.Unclaimed,
    Op.SHELVE: tiers.Shelve,
    Op.TELL: attach.Tell,
    Op.HAPPENED: attach.Happened,
}

REPLIES: dict[int, type[msgspec.Struct]] = {
    Op.HELLO: Welcome,
    Op.PING: Pong,
    Op.STATUS: StatusReply,
    Op.OPEN: Opened,
    Op.CLOSE: Done,
    Op.READ: ReadReply,
    Op.UPLOAD: Uploaded,
    Op.STOP: Stopping,
    Op.SHELVE: tiers.Shelved,
    Op.RUN: RunReply,
    Op.RESUME: RunReply,
    Op.RELEASE: Done,
    Op.CANCEL: Cancelled,
    Op.TOKENS: TokensReply,
    Op.CONTINUE: RunReply,
    Op.GENERATE: Generated,
    Op.LOOK: LookReply,
    Op.SWEEP: SweepReply,
    Op.TRACE: TraceReply,
    Op.WHERE: tiers.WhereReply,
    Op.CLAIM: tiers.ClaimReply,
    Op.EVENTS: tiers.EventsReply,
    Op.MOVE: tiers.MoveReply,
    Op.HOLD: tiers.HoldReply,
    Op.AWAY: tiers.AwayReply,
    Op.RESTORE: tiers.RestoreReply,
    Op.LOAD: Loaded,
    Op.FORWARD: forwards.Forwarded,
    Op.CARD: forwards.CardReply,
    Op.ATTACH: attach.Detached,
    Op.BREAKS: Done,
    Op.GO_ON: Done,
    Op.RUNS: attach.RunsReply,
}

# Of an answer that comes in parts, each part. Its reply, in REPLIES, says what they came to.
PARTS: dict[int, type[msgspec.Struct]] = {
    Op.GENERATE: Token,
    Op.SWEEP: Swept,
    Op.TRACE: Traced,
    Op.ATTACH: attach.Stopped,
    Op.EVENTS: tiers.Published,
}


# ---- the lease socket (AF_UNIX, one struct a packet, file descriptors beside it)


class Join(msgspec.Struct, frozen=True, array_like=True, tag=0, forbid_unknown_fields=True):
    """First packet of a client: which peer of the bus it is."""

    token: bytes


class Share(msgspec.Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """An arena its sender made, with its descriptor. Answered by a Granted with its number."""


class Want(msgspec.Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """Asks for the descriptor of an arena. Answered by a Granted with it."""

    arena: int


class Granted(msgspec.Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """owner: whose tensors the arena carries to an engine; "" for an engine's own."""

    arena: int
    owner: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    code: str
    text: str


class Retire(msgspec.Struct, frozen=True, array_like=True, tag=5, forbid_unknown_fields=True):
    """Server to engine: the arena's owner is gone, or has given it up; unmap it when nothing reads it.
    To the server: the sender gives up an arena of its own, in which there is nothing."""

    arena: int


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=6, forbid_unknown_fields=True):
    """Client to server: a lane it made, with its three descriptors, to the engine of *session*.
    Answered by a Granted with the lane's number."""

    session: int


class Listen(msgspec.Struct, frozen=True, array_like=True, tag=7, forbid_unknown_fields=True):
    """Server to engine: a client's lane, with its three descriptors. owner, pid: who speaks there."""

    lane: int
    owner: str
    pid: int = 0


class Broken(msgspec.Struct, frozen=True, array_like=True, tag=8, forbid_unknown_fields=True):
    """The other end of a lane is gone, or of no use, for the reason that *text* gives. From the
    server, to an engine or a client; or from an engine, about a client."""

    lane: int
    text: str


class Farewell(msgspec.Struct, frozen=True, array_like=True, tag=9, forbid_unknown_fields=True):
    """Engine to server: why its process ends now."""

    text: str


Lease = Join | Share | Want | Granted | Refused | Retire | Offer | Listen | Broken | Farewell
