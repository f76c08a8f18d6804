"""Bytes ↔ messages, without I/O.

    frame 0     header (32 bytes) and meta (msgpack), together
    frame 1..n  buffers

    offset  0      2  3  4      6        8          16         24           28      32
            magic  v  op flags  buffers  request    session    deadline_ms  credit  meta…
            "DJ"   u8 u8 u16    u16      u64        u64        u32          u32

All little-endian. `peek` reads the header alone, which is all that routing needs; `decode` checks
everything: the magic, the op, the meta's shape, the number of buffers, and each tensor's bytes.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Annotated, Any

import msgspec

from djinn_zmq.errors import DjinnError, ProtocolError, from_wire
from djinn_zmq.wire import attach, forwards, messages, sweeps, talks, tiers
from djinn_zmq.wire.edits import tensors_in
from djinn_zmq.wire.looks import LookReply
from djinn_zmq.wire.messages import VERSION, Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Tensor, check

MAGIC = b"DJ"
HEADER = struct.Struct("<2sBBHHQQII")
HEADER_SIZE = HEADER.size
OP = slice(3, 4)  # of frame 0, for who cannot wait for `peek`
BUFFERS_LIMIT = 64
EXAMPLE_LIMIT = 512  # bytes of a frame that is read once more while its like is waited for: 2 us

Buffer = bytes | memoryview


# Structs, not named tuples: made in one call of C, and a field is read where it lies. A named tuple
# takes 5 us more to make where it is cold, and 2 us to read from.
class Header(msgspec.Struct, frozen=True, gc=False):
    magic: bytes
    version: int
    op: int
    flags: int
    buffers: int
    request: int
    session: int
    deadline_ms: int  # 0: none. From the moment the request was sent
    credit: int  # PROGRESS messages, and PARTs, that the sender takes before the reply


# Plain ints, as everything on every message's way: an operation on enum members runs enum's Python.
OF_ANSWERS = int(Flag.REPLY | Flag.ERROR | Flag.PROGRESS | Flag.PART)
NOT_A_REPLY = int(Flag.ERROR | Flag.PROGRESS | Flag.PART)

# Answers what has no header to be read: a client then knows at least that it was refused.
NOBODYS = Header(MAGIC, VERSION, Op.PING, 0, 0, 0, 0, 0, 0)


class Message(msgspec.Struct, frozen=True):
    header: Header
    meta: Any  # the struct that REQUESTS or REPLIES names for the op
    buffers: Sequence[Buffer]


_pack, _unpack = HEADER.pack, HEADER.unpack_from
_KINDS = Flag.REPLY | Flag.ERROR | Flag.PROGRESS | Flag.PART
_FAILED = Flag.REPLY | Flag.ERROR

_encode = msgspec.msgpack.Encoder().encode
# By (the flags that say which side speaks, op): one look-up for every message on its way.
_decoders: dict[tuple[int, int], msgspec.msgpack.Decoder[Any]] = {}
# What they are made of when the first such message comes: a program meets a few of them, and all
# would be 2 ms of every client's start.
_metas = {
    (side, int(op)): kind
    for side, table in (
        (0, messages.REQUESTS),
        (int(Flag.REPLY), messages.REPLIES),
        (int(Flag.PART), messages.PARTS),
    )
    for op, kind in table.items()
}
_progress = msgspec.msgpack.Decoder(messages.Progress)
_failure = msgspec.msgpack.Decoder(messages.Failure)
_lease = msgspec.msgpack.Decoder(messages.Lease)


def encode(
    op: int,
    meta: msgspec.Struct,
    *,
    flags: int = 0,
    request: int = 0,
    session: int = 0,
    buffers: int = 0,
    deadline_ms: int = 0,
    credit: int = 0,
) -> bytes:
    """Frame 0 of a message with *buffers* buffers behind it."""
    header = _pack(MAGIC, VERSION, op, flags, buffers, request, session, deadline_ms, credit)
    return header + _encode(meta)


def failure(header: Header, error: DjinnError) -> bytes:
    """Frame 0 of the reply that refuses the request *header* belongs to."""
    return encode(
        header.op,
        messages.Failure(error.code, str(error)),
        flags=Flag.REPLY | Flag.ERROR,
        request=header.request,
        session=header.session,
    )


def peek(frame: Buffer) -> Header:
    """The header of frame 0. Raises ProtocolError for what is not one."""
    if len(frame) < HEADER_SIZE:
        raise ProtocolError(f"{len(frame)} bytes are no header: it has {HEADER_SIZE}")
    header = Header(*_unpack(frame))
    if header.magic != MAGIC or header.version != VERSION:
        if header.magic != MAGIC:
            raise ProtocolError(f"magic {header.magic!r}: a message starts with {MAGIC!r}")
        raise ProtocolError(f"protocol version {header.version}: this side speaks {VERSION}")
    return header


def decode(frame: Buffer, buffers: Sequence[Buffer] = (), header: Header | None = None) -> Message:
    """The whole message, checked. Raises ProtocolError; never allocates what a peer merely claims.

    header: what `peek` gave for *frame*, where it has been called already.
    """
    if header is None:
        header = peek(frame)
    decoder = _decoders.get((header.flags & _KINDS, header.op)) or _another_decoder(header)
    try:
        meta = decoder.decode(frame[HEADER_SIZE:])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise ProtocolError(f"the meta of {name_of(header.op)} does not decode: {exc}") from exc
    if header.buffers != len(buffers):
        raise ProtocolError(f"{header.buffers} buffers announced, {len(buffers)} came")
    if type(meta) in _TENSORS:
        for tensor in tensors_of(meta):
            check(tensor, buffers)
    return Message(header, meta, buffers)


def _another_decoder(header: Header) -> msgspec.msgpack.Decoder[Any]:
    """For the first message of its kind, for progress and failures; raises ProtocolError where
    there is none."""
    kind = header.flags & _KINDS
    meta = _metas.get((kind, header.op))
    if meta is not None:
        return _decoders.setdefault((kind, header.op), msgspec.msgpack.Decoder(meta))
    if kind == Flag.PROGRESS:
        return _progress
    if kind == _FAILED:
        return _failure
    side = {0: "request", Flag.REPLY: "reply", Flag.PART: "part of an answer"}.get(kind)
    if side is None:
        raise ProtocolError(
            f"flags {header.flags:#x} are neither a reply, an error, progress nor a part"
        )
    raise ProtocolError(f"op {header.op} is no {side} of this protocol")


def name_of(op: int) -> str:
    """What *op* is called, also where it is none: it may be whatever a peer says."""
    try:
        return Op(op).name
    except ValueError:
        return f"op {op}"


def tensors_of(meta: Any) -> Iterable[Tensor]:
    """Every tensor a message's meta speaks of."""
    find = _TENSORS.get(type(meta))
    return () if find is None else filter(None, find(meta))


# Getters of the standard library's, where every run's reply is read: a generator is ten times that.
_tensor = attrgetter("tensor")
_of_reply = attrgetter("ids", "logits", "top_values", "top_ids", "top_log_norm")

_TENSORS: dict[type, Callable[[Any], Iterable[Tensor | None]]] = {
    messages.Run: lambda meta: (meta.ids, *tensors_in(meta.edits)),
    messages.Tokens: lambda meta: (meta.ids,),
    messages.TokensReply: lambda meta: (meta.ids,),
    messages.Resume: lambda meta: (meta.hidden, *tensors_in(meta.edits)),
    messages.RunReply: lambda meta: (*_of_reply(meta), *map(_tensor, meta.checkpoints)),
    tiers.WhereReply: lambda meta: map(_tensor, meta.kept),
    tiers.ClaimReply: lambda meta: (*map(_tensor, meta.kept), *meta.ids),
    tiers.MoveReply: lambda meta: map(_tensor, meta.kept),
    tiers.HoldReply: lambda meta: (meta.tensor,),
    tiers.Restore: lambda meta: (meta.hidden, meta.ids),
    tiers.RestoreReply: lambda meta: (meta.kept.tensor,),
    tiers.Moved: lambda meta: (meta.kept.tensor,),
    LookReply: lambda meta: map(_tensor, meta.seen),
    talks.Continue: lambda meta: (meta.ids,),
    talks.Generate: lambda meta: (meta.ids, meta.hidden, *tensors_in(meta.edits)),
    talks.Token: lambda meta: (
        meta.before,
        meta.logits,
        meta.top_values,
        meta.top_ids,
        *map(_tensor, meta.checkpoints),
    ),
    talks.Generated: lambda meta: (meta.ids, *map(_tensor, meta.checkpoints)),
    sweeps.Sweep: lambda meta: (one for edits in meta.branches for one in tensors_in(edits)),
    sweeps.Trace: lambda meta: (
        prompt for prompt in (meta.clean, meta.corrupted) if isinstance(prompt, Tensor)
    ),
    sweeps.Swept: lambda meta: sweeps.tensors_of(meta.outcomes),
    sweeps.Traced: lambda meta: sweeps.tensors_of(meta.outcomes),
    sweeps.TraceReply: lambda meta: (meta.ids, *sweeps.tensors_of(meta.base)),
    forwards.Forward: forwards.tensors_of,
    forwards.Forwarded: lambda meta: map(_tensor, meta.outputs),
    forwards.CardReply: lambda meta: (piece for file in meta.files for piece in file.pieces),
    attach.GoOn: lambda meta: (meta.hidden, *tensors_in(meta.edits)),
    attach.Stopped: lambda meta: (
        meta.before,
        meta.ids,
        *map(_tensor, meta.checkpoints),
    ),
    messages.Keep: lambda meta: (meta.ids, *map(_tensor, meta.kept)),
    messages.Adopt: lambda meta: (meta.ids, *map(_tensor, meta.kept)),
    messages.ReadReply: lambda meta: (meta.piece,),
    messages.Uploaded: lambda meta: (meta.tensor,),
}


# A message in one piece, as it goes over a lane: envelope, frame 0, buffers.
Whole = tuple[bytes, bytes, list[memoryview]]
join: Callable[[tuple[bytes, bytes, Sequence[Buffer]]], bytes] = _encode
_BUFFERS = Annotated[list[memoryview], msgspec.Meta(max_length=BUFFERS_LIMIT)]
_split = msgspec.msgpack.Decoder(tuple[bytes, bytes, _BUFFERS]).decode


def split(data: bytes) -> Whole:
    """What `join` was given; the buffers are views of *data*. Raises ProtocolError, before anything
    is made of what a peer merely claims."""
    try:
        return _split(data)
    except msgspec.MsgspecError as exc:
        raise ProtocolError(f"not a message in one piece: {exc}") from exc


def error_of(message: Message) -> DjinnError:
    """The error that an ERROR reply carries."""
    return from_wire(message.meta.code, message.meta.text)


def encode_lease(packet: messages.Lease) -> bytes:
    """One packet of the lease socket."""
    return _encode(packet)


def decode_lease(data: bytes) -> messages.Lease:
    """Raises ProtocolError for what is not a packet of the lease socket."""
    try:
        packet: messages.Lease = _lease.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise ProtocolError(f"not a packet of the lease socket: {exc}") from exc
    return packet
