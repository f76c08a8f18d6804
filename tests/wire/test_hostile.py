"""Whatever comes off a socket: a message, or a ProtocolError, and no memory for what is claimed."""

import functools
import struct
import tracemalloc
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from djinn_zmq.errors import ProtocolError, SelectionError
from djinn_zmq.wire import codec, edits, messages, tensors
from djinn_zmq.wire.codec import HEADER_SIZE, decode, encode
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import DTYPES, Device, Frame, Inline, Slot, Tensor

FUZZ = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
KINDS = {(op, 0): kind for op, kind in messages.REQUESTS.items()}
KINDS |= {(op, int(Flag.REPLY)): kind for op, kind in messages.REPLIES.items()}
KINDS |= {(op, int(Flag.PART)): kind for op, kind in messages.PARTS.items()}
KINDS[Op.RUN, int(Flag.PROGRESS)] = messages.Progress
KINDS[Op.RUN, Flag.REPLY | Flag.ERROR] = messages.Failure


# ---- any message, from the types of its fields

INTS = st.integers(-(2**63), 2**63 - 1)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    str: st.text(max_size=12),
    bytes: st.binary(max_size=12),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
}


@st.composite
def honest_tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    nbytes = Tensor(dtype, shape, Inline(b"")).nbytes
    places = st.builds(Slot, INTS, INTS, INTS) | st.builds(Device, INTS, INTS, INTS)
    return Tensor(
        dtype, shape, draw(st.builds(Inline, st.binary(min_size=nbytes, max_size=nbytes)) | places)
    )


@functools.cache  # made anew for each example they take longer than all else here
def any_of(kind: Any) -> st.SearchStrategy[Any]:
    if kind is Tensor:
        return honest_tensors()
    if kind in PLAIN:
        return PLAIN[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([any_of(argument) for argument in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(any_of(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(any_of, arguments))
    assert issubclass(kind, msgspec.Struct), kind
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: any_of(hints[name]) for name in kind.__struct_fields__})


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    op, flags = draw(st.sampled_from(sorted(KINDS)))
    return encode(op, draw(any_of(KINDS[op, flags])), flags=flags)


def refused_or_usable(frame: bytes, buffers: tuple[bytes, ...] = ()) -> None:
    """Decode *frame*. What is not refused must be usable without another kind of error."""
    try:
        message = decode(frame, buffers)
    except ProtocolError:
        return
    codec._encode(message.meta)
    for tensor in codec.tensors_of(message.meta):
        if isinstance(tensor.where, (Inline, Frame)):
            assert tensors.view(tensor, buffers).nbytes == tensor.nbytes
    for edit in getattr(message.meta, "edits", ()):
        try:
            edits.selection(getattr(edit, "at", ()), (1, 5, 8))  # a Skip is nowhere
        except SelectionError:
            pass


# ---- round trips


@pytest.mark.parametrize("op, flags", sorted(KINDS), ids=lambda value: str(int(value)))
def test_every_message_comes_back_as_it_was_sent(op: int, flags: int) -> None:
    @settings(FUZZ, max_examples=15)
    @given(any_of(KINDS[op, flags]), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
    def comes_back(meta: Any, request: int, session: int) -> None:
        frame = encode(op, meta, flags=flags, request=request, session=session)
        message = decode(frame)
        assert message.meta == meta
        assert type(message.meta) is type(meta)
        assert (message.header.request, message.header.session) == (request, session)

    comes_back()


@settings(FUZZ, max_examples=100)
@given(any_of(messages.Lease))
def test_every_lease_packet_comes_back_as_it_was_sent(packet: Any) -> None:
    assert codec.decode_lease(codec.encode_lease(packet)) == packet


# ---- lies


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    refused_or_usable(data)
    with pytest.raises(ProtocolError):
        codec.decode_lease(b"\xc1" + data)
    try:
        codec.decode_lease(data)
    except ProtocolError:
        pass


@FUZZ
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=100))
def test_random_meta_behind_a_good_header_is_refused_or_usable(
    place: tuple[int, int], meta: bytes
) -> None:
    op, flags = place
    head = encode(op, messages.Ping(), flags=flags)[:HEADER_SIZE]
    refused_or_usable(head + meta)
    refused_or_usable(head + bytes([0x90 | (len(meta) & 15), op & 127]) + meta)


@settings(FUZZ, max_examples=60)
@given(frames())
def test_a_message_cut_short_anywhere_is_refused(frame: bytes) -> None:
    decode(frame)
    for length in range(len(frame)):
        with pytest.raises(ProtocolError):
            decode(frame[:length])


@FUZZ
@given(frames(), st.lists(st.integers(0, 2**16), min_size=1, max_size=3))
def test_flipped_bits_are_refused_or_usable(frame: bytes, places: list[int]) -> None:
    flipped = bytearray(frame)
    for place in places:
        flipped[place // 8 % len(frame)] ^= 1 << place % 8
    refused_or_usable(bytes(flipped))


def run_with(ids: Tensor, buffers: int = 0) -> bytes:
    return encode(
        Op.RUN,
        messages.Run((), ids, messages.Wanted(None, (), "none", 0)),
        buffers=buffers,
    )


LYING_TENSORS: dict[str, tuple[Tensor, str]] = {
    "too many bytes": (
        Tensor("int64", (1,), Inline(bytes(16))),
        "takes 8 bytes, the message carries 16",
    ),
    "too few bytes": (Tensor("int64", (1, 3), Inline(bytes(16))), "takes 24 bytes"),
    "no bytes": (Tensor("uint8", (), Inline(b"")), "takes 1 bytes"),
    "a terabyte claimed": (Tensor("uint8", (1 << 40,), Inline(b"")), "takes 1099511627776 bytes"),
    "a product beyond 64 bits": (Tensor("uint8", (1 << 62,) * 8, Inline(b"")), "at most"),
    "a product that wraps to 0": (Tensor("uint8", (1 << 32, 1 << 32), Inline(b"")), "at most"),
    "a huge slot": (Tensor("uint8", (1 << 45,), Slot(1, 1, 1)), "at most"),
    "no bytes, huge extents": (Tensor("uint8", (0, 1 << 62, 1 << 62), Inline(b"")), "too large"),
    "one huge extent": (Tensor("uint8", (0, 2**64 - 1), Slot(1, 1, 1)), "too large"),
    "a negative extent": (Tensor("uint8", (-1,), Inline(b"")), "cannot be negative"),
    "two negative extents": (Tensor("uint8", (-1, -1), Inline(b"1")), "cannot be negative"),
    "rank 9": (Tensor("uint8", (1,) * 9, Inline(b"1")), "rank 9: at most 8"),
    "rank 1000": (Tensor("uint8", (1,) * 1000, Inline(b"1")), "rank 1000"),
    "object dtype": (Tensor("object", (1,), Inline(bytes(8))), 'dtype "object" is not one of'),
    "a numpy name that is no wire name": (Tensor("<f4", (1,), Inline(bytes(4))), "is not one of"),
    "a buffer that did not come": (Tensor("uint8", (1,), Frame(1)), "buffer 1 of a message with 1"),
    "a buffer before the first": (Tensor("uint8", (1,), Frame(-1)), "buffer -1"),
    "a buffer of another size": (Tensor("uint8", (2,), Frame(0)), "takes 2 bytes"),
}


@pytest.mark.parametrize("lie", LYING_TENSORS)
def test_a_tensor_that_lies_is_refused_by_name_and_without_memory(lie: str) -> None:
    tensor, reason = LYING_TENSORS[lie]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=reason):
            decode(run_with(tensor, buffers=1), [b"1"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


LIAR = Tensor("uint8", (1 << 40,), Inline(b""))
HONEST = Tensor("uint8", (), Inline(b"1"))
WANTED = messages.Wanted(None, (), "none", 0)
KEPT = messages.Kept(1, 1, 1, 1, LIAR)
PLACES: list[tuple[str, Callable[[], bytes]]] = [
    (
        type(meta).__name__,
        lambda meta=meta, flags=flags, op=op: encode(
            op or type(meta).__struct_config__.tag, meta, flags=flags
        ),
    )
    for meta, flags, op in (
        (messages.Run((), LIAR, WANTED), 0, None),
        (messages.Tokens("", LIAR), 0, None),
        (messages.TokensReply(LIAR, ()), Flag.REPLY, None),
        (messages.Resume(1, LIAR, (), WANTED), 0, None),
        (messages.Resume(1, None, (edits.Add(LIAR, ()),), WANTED), 0, None),
        (messages.Resume(1, None, (edits.Set(LIAR, ()),), WANTED), 0, None),
        (messages.Resume(1, None, (edits.Lerp(LIAR, 1.0, ()),), WANTED), 0, None),
        (messages.Resume(1, None, (edits.Project(LIAR, ()),), WANTED), 0, None),
        (messages.RunReply(1, "", 1, LIAR, (), None, 0, None, None, None, ()), Flag.REPLY, None),
        (messages.RunReply(1, "", 1, HONEST, (KEPT,), None, 0, None, None, None, ()), 1, None),
        (messages.RunReply(1, "", 1, HONEST, (), LIAR, 0, None, None, None, ()), 1, Op.RESUME),
        (messages.RunReply(1, "", 1, HONEST, (), None, 0, LIAR, None, None, ()), 1, None),
        (messages.RunReply(1, "", 1, HONEST, (), None, 0, None, LIAR, None, ()), 1, None),
        (messages.RunReply(1, "", 1, HONEST, (), None, 0, None, None, LIAR, ()), 1, None),
        (messages.Keep(LIAR, ()), 0, None),
        (messages.Keep(HONEST, (KEPT,)), 0, None),
        (messages.Adopt(LIAR, ()), 0, None),
        (messages.Adopt(HONEST, (KEPT,)), 0, None),
        (messages.ReadReply("uint8", (1,), LIAR), Flag.REPLY, None),
        (messages.Uploaded(1, LIAR), Flag.REPLY, None),
    )
]


@pytest.mark.parametrize("make", [make for _, make in PLACES], ids=[name for name, _ in PLACES])
def test_a_lying_tensor_is_found_wherever_a_message_carries_one(make: Callable[[], bytes]) -> None:
    with pytest.raises(ProtocolError, match="takes 1099511627776 bytes"):
        decode(make())


def test_no_message_carries_a_tensor_that_is_not_checked() -> None:
    def holds_tensor(kind: Any) -> bool:
        if kind is Tensor:
            return True
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return any(map(holds_tensor, typing.get_type_hints(kind).values()))
        return any(map(holds_tensor, typing.get_args(kind)))

    kinds = {*KINDS.values()}
    assert {kind for kind in kinds if holds_tensor(kind)} == set(codec._TENSORS)


@pytest.mark.parametrize(
    "meta",
    [
        b"\x92\x12\xdd" + b"\xff" * 4,  # RELEASE of 2**32 - 1 ids
        b"\xdd" + b"\xff" * 4 + b"\x12",
        b"\x92\x12\xdb" + b"\xff" * 4,
        b"\x92\x12\xc6" + b"\xff" * 4,
        b"\xdf" + b"\xff" * 4,
        b"\xc9" + b"\xff" * 4,
        b"\x91" * 200_000,
        b"\x92\x12" + b"\x91" * 200_000,
    ],
)
def test_a_claimed_length_takes_no_memory(meta: bytes) -> None:
    frame = encode(Op.RELEASE, messages.Ping())[:HEADER_SIZE] + meta
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_invalid_utf8_is_refused_by_name() -> None:
    head = encode(Op.OPEN, messages.Ping())[:HEADER_SIZE]
    with pytest.raises(ProtocolError, match="the meta of OPEN does not decode"):
        decode(head + b"\x92\x04\xa2\xff\xff")


@pytest.mark.parametrize("announced", [1, 64, 65, 65535])
def test_announced_buffers_that_never_came_are_refused(announced: int) -> None:
    frame = bytearray(encode(Op.PING, messages.Ping()))
    struct.pack_into("<H", frame, 6, announced)
    with pytest.raises(ProtocolError, match=f"{announced} buffers announced, 0 came"):
        decode(bytes(frame))
