"""An engine's lanes: what a client hands over may be no lane."""

import gc
import os
from typing import Any

import pytest

from djinn_zmq.bus.lane import CAPACITY, Lane
from djinn_zmq.bus.poll import Poll
from djinn_zmq.engine.lanes import Lanes
from djinn_zmq.memory import shared
from djinn_zmq.settings import Settings
from djinn_zmq.wire.messages import Listen


def test_what_is_offered_and_is_no_lane_is_given_up_by_name_and_ends_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: list[tuple[int, str]] = []
    poll, nothing = Poll(), Any
    lanes = Lanes(poll, Settings(), nothing, lambda *news: broken.append(news))
    gc.collect()  # what other tests left would be closed in between
    before = len(os.listdir("/proc/self/fd"))
    lanes.listen(Listen(3, "a user"), [os.memfd_create("one") for _ in range(2)])
    assert broken.pop() == (3, "a lane came with 2 descriptors")

    def refuses(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    ours, theirs = Lane.create(CAPACITY, Settings())
    monkeypatch.setattr(shared, "mapped", refuses)  # as of huge pages that there are none of
    lanes.listen(Listen(4, "a user"), theirs)
    assert broken.pop() == (4, "[Errno 12] Cannot allocate memory")
    ours.close()
    assert len(os.listdir("/proc/self/fd")) == before
    poll.close()
