"""What an engine's loop does beside requests."""

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.bus.lane import CAPACITY, Lane, wait
from djinn_zmq.bus.lease import close_all, pair
from djinn_zmq.bus.link import Link
from djinn_zmq.engine.devices import Broken, Cpu
from djinn_zmq.engine.loop import EngineLoop, connect
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import Lost
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import Enter, Granted, Listen, Ping, Pong, Share, Want
from djinn_zmq.wire.ops import Op

SETTINGS = Settings()
WAIT_S = 10.0


class Dying(Cpu):
    def broken(self, error: BaseException) -> str:
        return "its CUDA context is poisoned" if "CUDA" in str(error) else ""


@pytest.mark.parametrize(("text", "ends_as"), [("CUDA error", Broken), ("a mistake", RuntimeError)])
def test_a_device_found_broken_by_a_copy_that_nobody_waits_for_is_said_to_be(
    text: str, ends_as: type[Exception]
) -> None:
    def fill() -> None:
        raise RuntimeError(text)

    nothing: Any = None
    loop: Any = SimpleNamespace(
        _keeping=SimpleNamespace(tiers=SimpleNamespace(fill=fill)),
        _work=Work(nothing, nothing, nothing, nothing, nothing, nothing, Dying()),
    )
    with pytest.raises(ends_as):
        EngineLoop._fill(loop)


def test_a_lane_that_is_introduced_while_the_engine_asks_for_something_is_listened_to() -> None:
    link, link_ends = Link.create(SETTINGS)
    server, theirs = pair()
    server.socket.settimeout(WAIT_S)
    lane, lane_ends = Lane.create(CAPACITY, SETTINGS)

    def engine() -> None:
        loop = EngineLoop(*connect(link_ends, theirs.detach(), SETTINGS), Cpu(), SETTINGS, 0)

        def asks() -> Iterator[None]:
            loop._lease.ask(Want(7))
            yield from ()

        loop._work.chores.append(asks())
        with contextlib.suppress(Lost):
            loop.serve()
        loop.close()

    thread = threading.Thread(target=engine)
    thread.start()
    packet, fds = server.receive()
    assert isinstance(packet, Share)
    close_all(fds)
    link.send(b"", codec.encode(Op.ENTER, Enter("a user", "tiny", 0), session=5))
    server.send(Granted(1))
    packet, _ = server.receive()
    assert packet == Want(7)
    server.send(Listen(3, "a user"), *lane_ends)  # crosses the answer
    lane_ends.close()
    server.send(Granted(7))  # and nothing else wakes the engine
    lane.send(b"", codec.encode(Op.PING, Ping(), request=9, session=5))
    answer = None
    limit = time.monotonic() + WAIT_S
    while answer is None and time.monotonic() < limit:
        wait(lane, server.socket.fileno(), WAIT_S)
        answer = lane.receive()
    server.close()
    thread.join(WAIT_S)
    link.close()
    lane.close()
    assert answer is not None and codec.decode(answer[1]).meta == Pong("idle")
