"""The bytes of the protocol. A change here is a new protocol version."""

import struct
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest

from djinn_zmq import errors
from djinn_zmq.errors import LayerError, ProtocolError
from djinn_zmq.wire import codec, edits, forwards, looks, messages, stops
from djinn_zmq.wire.codec import HEADER_SIZE, Header, decode, encode, peek
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Frame, Slot, Tensor, inline

LAST = messages.Wanted(None, (), "last", 0)
VECTOR = inline(np.array([1.0, -2.0], np.float32))
IDS = inline(np.array([[1, 2]], np.int64))

# (op, flags and other header fields, meta, the bytes)
GOLDEN = {
    "ping": (
        Op.PING,
        {"request": 1},
        messages.Ping(),
        "444a0102 0000 0000 0100000000000000 0000000000000000 00000000 0000000091 02",
    ),
    "run": (
        Op.RUN,
        {"request": 2, "session": 3, "flags": Flag.SHARED, "deadline_ms": 5000, "credit": 7},
        messages.Run(("hi",), None, messages.Wanted(2, (1,), "top", 5)),
        (
            "444a0110 0800 0000 0200000000000000 0300000000000000 88130000 07000000"
            "95 10 91 a26869 c0 94 02 91 01 a3746f70 05 90"
        ),
    ),
    "resume with an add": (
        Op.RESUME,
        {"request": 0x0102030405060708, "session": 0x1112131415161718},
        messages.Resume(
            9, None, (edits.Add(VECTOR, (edits.Pick(0), edits.Pick(-1), edits.Rest())),), LAST
        ),
        (
            "444a0111 0000 0000 0807060504030201 1817161514131211 00000000 00000000"
            "96 11 09 c0"
            "91 93 00 93 a7666c6f61743332 91 02 92 00 c408 0000803f 000000c0"
            "93 92 00 00 92 00 ff 91 03"
            "94 c0 90 a46c617374 00 90"
        ),
    ),
    "resume with hidden in a frame and every edit": (
        Op.RESUME,
        {"buffers": 1},
        messages.Resume(
            1,
            Tensor("uint8", (1, 3), Frame(0)),
            (
                edits.Zero((edits.Stretch(None, -1, 2),)),
                edits.Scale(0.5, (edits.Take((0, 2)),)),
                edits.Set(Tensor("bool", (), Slot(1, 2, 3)), ()),
                edits.Project(VECTOR, ()),
                edits.Lerp(VECTOR, 0.25, ()),
                edits.Patch(4, (), ()),
            ),
            LAST,
        ),
        (
            "444a0111 0000 0100 0000000000000000 0000000000000000 00000000 00000000"
            "96 11 01 93 a575696e7438 92 01 03 92 01 00"
            "96"
            "92 03 91 94 01 c0 ff 02"
            "93 02 cb3fe0000000000000 91 92 02 92 00 02"
            "93 01 93 a4626f6f6c 90 94 02 01 02 03 90"
            "93 04 93 a7666c6f61743332 91 02 92 00 c408 0000803f 000000c0 90"
            "94 05 93 a7666c6f61743332 91 02 92 00 c408 0000803f 000000c0 cb3fd0000000000000 90"
            "94 06 04 90 90"
            "94 c0 90 a46c617374 00 90"
        ),
    ),
    "run with stops of every kind": (
        Op.RUN,
        {},
        messages.Run(
            ("hi",),
            None,
            messages.Wanted(
                stops.Stops(
                    (
                        stops.Break(
                            2,
                            (
                                (stops.HasNaN(),),
                                (stops.Norm(">", 0.5), stops.Step(3)),
                                (stops.Token("is"),),
                            ),
                        ),
                        stops.Break(".mlp", ()),
                    ),
                    ("norm",),
                ),
                (),
                "last",
                0,
            ),
            (edits.Skip(3),),
        ),
        (
            "444a0110 0000 0000 0000000000000000 0000000000000000 00000000 00000000"
            "95 10 91 a26869 c0 94"
            "93 00 92 92 02 93 91 91 00 92 93 01 a13e cb3fe0000000000000 92 03 03 91 92 02 a26973"
            "92 a42e6d6c70 90 91 a46e6f726d"
            "90 a46c617374 00 91 92 07 03"
        ),
    ),
    "look": (
        Op.LOOK,
        {},
        looks.Look(looks.Lens(9, (0, -1), 3)),
        (
            "444a0115 0000 0000 0000000000000000 0000000000000000 00000000 00000000"
            "92 15 94 02 09 92 00 ff 03"
        ),
    ),
    "forward": (
        Op.FORWARD,
        {},
        forwards.Forward(
            7,
            (forwards.Select(IDS), forwards.Repeat(3), forwards.Crop(2)),
            IDS,
            None,
            None,
            IDS,
            1,
            True,
            False,
        ),
        (
            "444a0138 0000 0000 0000000000000000 0000000000000000 00000000 00000000"
            "9a380793920093a5696e7436349201029200c4100100000000000000020000000000000092010392"
            "020293a5696e7436349201029200c41001000000000000000200000000000000c0c093a5696e7436"
            "349201029200c4100100000000000000020000000000000001c3c2"
        ),
    ),
    "failure": (
        Op.RUN,
        {"request": 2, "session": 3, "flags": Flag.REPLY | Flag.ERROR},
        messages.Failure("layer", "no 9"),
        (
            "444a0110 0300 0000 0200000000000000 0300000000000000 00000000 00000000"
            "93 31 a56c61796572 a46e6f2039"
        ),
    ),
    "progress": (
        Op.OPEN,
        {"request": 2, "flags": Flag.PROGRESS},
        messages.Progress("weights", 1, 2),
        (
            "444a0104 0400 0000 0200000000000000 0000000000000000 00000000 00000000"
            "95 30 a777656967687473 01 02 c0"
        ),
    ),
}
BUFFERS = {"resume with hidden in a frame and every edit": [b"\1\2\3"]}

LEASES = {
    "join": (messages.Join(b"\xaa\xbb"), "92 00 c402 aabb"),
    "share": (messages.Share(), "91 01"),
    "want": (messages.Want(300), "92 02 cd012c"),
    "granted": (messages.Granted(7), "93 03 07 a0"),
    "refused": (messages.Refused("busy", "no"), "93 04 a462757379 a26e6f"),
    "retire": (messages.Retire(7), "92 05 07"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_message_has_the_bytes_it_always_had(name: str) -> None:
    op, fields, meta, golden = GOLDEN[name]
    frame = encode(op, meta, **fields)
    assert frame.hex() == golden.replace(" ", "")
    assert decode(frame, BUFFERS.get(name, ())).meta == meta


@pytest.mark.parametrize("name", LEASES)
def test_a_lease_packet_has_the_bytes_it_always_had(name: str) -> None:
    packet, golden = LEASES[name]
    assert codec.encode_lease(packet).hex() == golden.replace(" ", "")
    assert codec.decode_lease(codec.encode_lease(packet)) == packet


def test_every_header_field_stands_at_its_offset() -> None:
    frame = encode(
        Op.TOKENS,
        messages.Ping(),
        flags=0x0201,
        buffers=0x0403,
        request=0x0C0B0A0908070605,
        session=0x14131211100F0E0D,
        deadline_ms=0x18171615,
        credit=0x1C1B1A19,
    )
    assert HEADER_SIZE == 32
    assert frame[:4] == b"DJ\x01\x14"
    assert frame[4:32] == bytes(range(1, 29))
    assert struct.unpack_from("<HHQQII", frame, 4) == msgspec.structs.astuple(peek(frame))[3:]


def test_peek_gives_what_encode_was_given() -> None:
    fields = {"flags": 9, "buffers": 2, "request": 5, "session": 6, "deadline_ms": 7, "credit": 8}
    header = peek(encode(Op.PING, messages.Ping(), **fields))
    assert header == Header(b"DJ", 1, Op.PING, 9, 2, 5, 6, 7, 8)


def test_a_refusal_answers_the_request_it_belongs_to() -> None:
    asked = peek(encode(Op.RUN, messages.Ping(), request=5, session=6, deadline_ms=9, credit=3))
    message = decode(codec.failure(asked, LayerError("layer 9 does not exist")))
    assert message.header == Header(b"DJ", 1, Op.RUN, Flag.REPLY | Flag.ERROR, 0, 5, 6, 0, 0)
    error = codec.error_of(message)
    assert type(error) is LayerError
    assert str(error) == "layer 9 does not exist"


def test_a_code_of_a_newer_peer_is_still_an_error() -> None:
    error = errors.from_wire("invented-tomorrow", "something")
    assert type(error) is errors.DjinnError
    assert str(error) == "something"


def test_every_error_crosses_the_wire_as_itself() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = [kind.code for kind in kinds]
    assert len(set(codes)) == len(codes)
    for kind in kinds:
        assert type(errors.from_wire(kind.code, "text")) is kind


def test_every_op_has_a_tag_and_a_struct_of_its_own() -> None:
    for op, kind in messages.REQUESTS.items():
        assert kind.__struct_config__.tag == op
    beside = {Op.PROGRESS, Op.FAILURE}
    assert set(messages.REQUESTS) | beside == set(Op)
    assert set(messages.REPLIES) < set(messages.REQUESTS)


def test_every_message_that_may_speak_of_a_tensor_has_it_checked() -> None:
    def speaks_of_one(kind: Any) -> bool:
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return kind is Tensor or any(map(speaks_of_one, get_type_hints(kind).values()))
        return any(map(speaks_of_one, get_args(kind)))

    kinds = {*messages.REQUESTS.values(), *messages.REPLIES.values(), *messages.PARTS.values()}
    assert {kind for kind in kinds if speaks_of_one(kind)} == set(codec._TENSORS)


@pytest.mark.parametrize("length", range(HEADER_SIZE))
def test_a_truncated_header_is_refused_by_name(length: int) -> None:
    frame = encode(Op.PING, messages.Ping())
    with pytest.raises(ProtocolError, match=f"{length} bytes are no header"):
        peek(frame[:length])


def test_another_magic_or_version_is_refused_by_name() -> None:
    frame = encode(Op.PING, messages.Ping())
    with pytest.raises(ProtocolError, match="magic b'GE'"):
        peek(b"GE" + frame[2:])
    with pytest.raises(ProtocolError, match="protocol version 2"):
        peek(frame[:2] + b"\2" + frame[3:])


@pytest.mark.parametrize("op", [0, 99, Op.PROGRESS, Op.FAILURE, 255])
def test_an_op_that_is_no_request_is_refused_by_name(op: int) -> None:
    with pytest.raises(ProtocolError, match=f"op {op} is no request"):
        decode(encode(op, messages.Ping()))


@pytest.mark.parametrize("op", [Op.CHUNK, Op.READY, Op.KEEP, 255])
def test_an_op_that_has_no_reply_is_refused_by_name(op: int) -> None:
    with pytest.raises(ProtocolError, match=f"op {int(op)} is no reply"):
        decode(encode(op, messages.Ping(), flags=Flag.REPLY))


@pytest.mark.parametrize(
    "flags",
    [
        Flag.ERROR,
        Flag.PROGRESS | Flag.REPLY,
        Flag.PROGRESS | Flag.ERROR,
        Flag.PROGRESS | Flag.ERROR | Flag.REPLY,
        Flag.PART | Flag.REPLY,
        Flag.PART | Flag.PROGRESS,
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: int) -> None:
    for meta in (messages.Failure("busy", ""), messages.Progress("", 0, 0), messages.Ping()):
        with pytest.raises(ProtocolError, match="flags"):
            decode(encode(Op.PING, meta, flags=flags))


def test_the_buffers_announced_must_be_those_that_came() -> None:
    for announced, came in ((1, []), (0, [b""]), (2, [b""]), (65535, [])):
        with pytest.raises(ProtocolError, match=f"{announced} buffers announced, {len(came)} came"):
            decode(encode(Op.PING, messages.Ping(), buffers=announced), came)


def test_a_field_too_many_or_too_few_is_refused() -> None:
    head = encode(Op.CANCEL, messages.Cancel(1))[:HEADER_SIZE]
    assert decode(head + b"\x92\x13\x01").meta == messages.Cancel(1)
    for meta in (
        b"\x93\x13\x01\x01",
        b"\x91\x13",
        b"\x92\x13\xa11",
        b"\x92\x13\xc3",
        b"\x81\x13\x01",
    ):
        with pytest.raises(ProtocolError, match="the meta of CANCEL does not decode"):
            decode(head + meta)


def test_bytes_behind_the_meta_are_refused() -> None:
    with pytest.raises(ProtocolError, match="does not decode"):
        decode(encode(Op.PING, messages.Ping()) + b"\0")


def test_the_meta_of_another_op_is_refused() -> None:
    for op in messages.REQUESTS.keys() - {Op.PING}:
        with pytest.raises(ProtocolError, match="does not decode"):
            decode(encode(op, messages.Ping()))


def test_a_reply_without_its_flag_is_no_request() -> None:
    empty = inline(np.zeros(0, np.int64))
    replies = [
        (Op.HELLO, messages.Welcome("", 1, "", b"", (), 1)),
        (Op.PING, messages.Pong("ready")),
        (Op.UPLOAD, messages.Uploaded(1, empty)),
        (Op.READ, messages.ReadReply("uint8", (0,), empty)),
        (Op.CANCEL, messages.Cancelled(True)),
        (Op.TOKENS, messages.TokensReply(empty, ())),
        (Op.RELEASE, messages.Done()),
        (Op.STOP, messages.Stopping(30.0)),
    ]
    for op, meta in replies:
        decode(encode(op, meta, flags=Flag.REPLY))
        with pytest.raises(ProtocolError):
            decode(encode(op, meta))


def test_decode_takes_a_memoryview_as_well() -> None:
    frame = encode(Op.CANCEL, messages.Cancel(1))
    assert decode(memoryview(frame)).meta == messages.Cancel(1)
