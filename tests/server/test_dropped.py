"""A client that did not read its answers, and reads again."""

from typing import Any

import pytest
import zmq

from djinn_zmq.errors import Lost
from djinn_zmq.server import dropped
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.ops import Op
from tests.server.serving import Served


def test_who_was_dropped_is_told_once_there_is_room(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.connect(served.tcp)
    served.ask(client, Op.PING, messages.Ping())
    (peer,) = served.server.registry.peers.values()
    tried: list[bytes] = []

    def full(route: bytes, *_: Any) -> None:
        tried.append(route)
        raise zmq.Again

    monkeypatch.setattr(dropped, "TRY_EVERY_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(peer.router, "_send", full)
        client.send(codec.encode(Op.PING, messages.Ping(), request=2))
        served.until(lambda: not served.server.registry.peers)
        served.until(lambda: len(tried) >= 3)  # and tried to be told
        assert client.receive() is None
    heard: list[Any] = []
    served.until(lambda: heard.append(client.receive()) or heard[-1] is not None)
    error = codec.error_of(codec.decode(*heard[-1]))
    assert isinstance(error, Lost) and "did not read its answers: what it asked" in str(error)
    assert served.server._dropped.due_s == float("inf")
    assert served.ask(client, Op.PING, messages.Ping()).state == "serving"


def test_who_is_gone_meanwhile_is_told_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.connect(served.tcp)
    served.ask(client, Op.PING, messages.Ping())
    (peer,) = served.server.registry.peers.values()
    monkeypatch.setattr(dropped, "TRY_EVERY_S", 0.01)
    client.close()
    served.until(lambda: not served.server.registry.peers)
    served.server._dropped.add(peer)
    served.until(lambda: served.server._dropped.due_s == float("inf"))
