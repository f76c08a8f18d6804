"""What is kept for nobody is named, all of it and nothing that there is not, and said to who keeps it."""

from typing import Any

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client.calls import Call
from djinn_zmq.client.leftovers import AT_ONCE, kept_by
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.session import Session
from djinn_zmq.client.waiting import WaitingConnection
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.forwards import Forwarded, Output
from djinn_zmq.wire.looks import LookReply, Seen
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.talks import Generated, Token
from djinn_zmq.wire.tensors import Inline, Tensor
from djinn_zmq.wire.tiers import HoldReply, RestoreReply
from tests.client import test_parts
from tests.client.test_parts import OPENED, Script

script = test_parts.script

TENSOR = Tensor("uint8", (1,), Inline(b"\0"))


def kept(number: int) -> Kept:
    return Kept(number, 1, 1, 2, TENSOR)


def ran(logits_id: int, branch: int, *checkpoints: Kept) -> messages.RunReply:
    return messages.RunReply(
        1, "finished", 4, None, checkpoints, None, logits_id, None, None, None, (), branch
    )


def generated(branch: int, *checkpoints: Kept) -> Generated:
    return Generated(1, "finished", "length", 1, 4, TENSOR, checkpoints, branch, ())


@pytest.mark.parametrize(
    ("meta", "numbers"),
    [
        (ran(13, 14, kept(11), kept(12)), [11, 12, 13, 14]),
        (ran(0, 0), []),
        (Token(None, 0, 99, "a", 0.0, 0.0, None, None, None, (kept(11), kept(12))), [11, 12]),
        (generated(13, kept(11), kept(12)), [11, 12, 13]),
        (generated(0), []),
        (LookReply((Seen(TENSOR, 11), Seen(TENSOR, 0), Seen(TENSOR, 12)), ()), [11, 12]),
        (
            Forwarded(1, "", (Output("a", 0, TENSOR, 11), Output("b", 0, TENSOR, 0)), 12, 1, ()),
            [12, 11],
        ),
        (Forwarded(1, "", (), 0, 0, ()), []),
        (messages.Uploaded(11, TENSOR), [11]),
        (HoldReply(11, TENSOR, None), [11]),
        (RestoreReply(kept(11), ()), [11]),
        (messages.Progress("run", 1, 4), []),
    ],
)
def test_all_that_a_reply_brings_is_named_to_be_released(meta: Any, numbers: list[int]) -> None:
    assert sorted(kept_by(meta)) == sorted(numbers)


@pytest.mark.parametrize("error", [Busy("full"), KeyboardInterrupt()])
def test_what_could_not_be_released_now_is_released_with_the_next_request(
    script: Script, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    said: list[tuple[int, ...]] = []

    def fail(*_: object) -> None:
        raise error

    def noted(frame: bytes, *_: object) -> None:
        message = codec.decode(frame)
        said.append((message.header.session, *sorted(message.meta.ids)))

    with djinn.connect(script.endpoint) as server:
        connection = server.connection
        for session, number in ((7, 1), (8, 2), (7, 3)):
            connection.leftovers.add(session, number)
        with monkeypatch.context() as patch:
            patch.setattr(connection, "_send", fail)
            with pytest.raises(type(error)):
                server.ping()
            patch.setattr(connection, "_send", noted)
            server.ping()
    assert sorted(said) == [(7, 1, 3), (8, 2)]


def test_more_is_released_at_once_than_one_message_says(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []

    def noted(frame: bytes, *_: object) -> None:
        # What is longer is refused, and nobody hears of it: it goes one way.
        assert len(frame) <= Settings().meta_limit
        said.extend(codec.decode(frame).meta.ids)

    numbers = range(2**62, 2**62 + 40_000)
    with djinn.connect(script.endpoint) as server:
        for number in numbers:
            server.connection.leftovers.add(7, number)
        monkeypatch.setattr(server.connection, "_send", noted)
        server.ping()
    assert sorted(said) == list(numbers)


def test_what_goes_with_a_request_is_what_its_session_has_let_go_of_where_a_lane_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    for session, number in [(7, 1), (8, 2), (7, 0), (7, 3)]:
        connection.leftovers.add(session, number)
    assert connection.released_beside(7) == ()  # over the bus it is the server's to know
    monkeypatch.setattr(connection.lanes, "of", lambda session: session)
    monkeypatch.setattr(connection, "_calls", {1: None})
    assert connection.released_beside(7) == ()
    monkeypatch.setattr(connection, "_calls", {})
    assert connection.released_beside(7) == (1, 3)
    assert list(connection.leftovers.noted) == [
        (8, 2),
        (7, 0),
    ]  # another's, and a session's own end
    for number in range(1, 100):
        connection.leftovers.add(9, number)
    assert connection.released_beside(9) == (*range(1, AT_ONCE + 1),)
    connection.close()


def test_what_went_with_a_resume_that_fails_is_let_go_of_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    session = Session(connection, connection.drive, None, OPENED)
    point = Checkpoint(session, kept(5), np.ones((1, 3), np.int64))
    connection.leftovers.add(session.id, 4)
    monkeypatch.setattr(connection.lanes, "of", lambda session: session)
    sent: list[object] = []

    def send(call: Call) -> int:
        sent.append(call.meta.released)
        raise Lost("the engine died")

    monkeypatch.setattr(connection, "send", send)
    with pytest.raises(Lost):
        point.resume(stop_at=2)
    assert sent == [(4,)] and list(connection.leftovers.noted) == [(session.id, 4)]
    connection.close()
