"""Clients that were dropped because they did not read their answers. They are told when they read again:
their connection lasts, and who waits for an answer would wait for ever."""

import time

from djinn_zmq.errors import Busy, Lost
from djinn_zmq.server.registry import Peer
from djinn_zmq.wire import codec
from djinn_zmq.wire.codec import NOBODYS

TRY_EVERY_S = 1.0
NOTICE = codec.failure(
    NOBODYS,
    Lost(
        "the server dropped this client, which did not read its answers: what it asked for is lost, and its "
        "sessions have ended, unless a key keeps them"
    ),
)


class Dropped:
    def __init__(self) -> None:
        self._peers: dict[bytes, Peer] = {}  # by route, with the router's tag
        self.due_s = float("inf")  # monotonic: when to try to tell them

    def add(self, peer: Peer) -> None:
        self._peers[peer.envelope] = peer
        self.due_s = min(self.due_s, time.monotonic() + TRY_EVERY_S)

    def tell(self) -> None:
        """Those whose queue has room by now."""
        if time.monotonic() < self.due_s:
            return
        for envelope, peer in tuple(self._peers.items()):
            try:
                peer.router.send(peer.route, NOTICE)
            except Busy:
                continue
            except Lost:
                pass  # it is gone by now
            del self._peers[envelope]
        self.due_s = time.monotonic() + TRY_EVERY_S if self._peers else float("inf")
