"""What a reply that nobody takes had kept: all of it is named, and nothing that there is not."""

from typing import Any

import pytest

from djinn_zmq.client.leftovers import kept_by
from djinn_zmq.wire import messages
from djinn_zmq.wire.forwards import Forwarded, Output
from djinn_zmq.wire.looks import LookReply, Seen
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.talks import Generated, Token
from djinn_zmq.wire.tensors import Inline, Tensor
from djinn_zmq.wire.tiers import HoldReply, RestoreReply

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
