"""Which client has a lane to which engine. The server introduces the two and then is out of the way.

A client offers a lane it made, for a session of its own; the engine of that session gets the
descriptors, with whose lane it is. From then on the server hears of the lane only when one of its
ends is gone, and tells the other.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from djinn_zmq.bus.lease import close_all
from djinn_zmq.errors import Busy, Lost
from djinn_zmq.server.engines import Engine
from djinn_zmq.server.registry import Peer, Registry
from djinn_zmq.wire import states
from djinn_zmq.wire.messages import Broken, Listen, Offer

LANES_LIMIT = 8  # of one client: it needs one to each engine it has sessions on


@dataclass(slots=True, eq=False)
class LaneRecord:
    peer: Peer
    engine: int


class Lanes:
    def __init__(self, registry: Registry, engines: Sequence[Engine]) -> None:
        self._registry = registry
        self._engines = engines
        self._lanes: dict[int, LaneRecord] = {}
        self._last = 0

    def offer(self, peer: Peer, offer: Offer, fds: list[int]) -> int:
        """Hand *peer*'s lane to the engine of its session. Returns the lane's number.

        Takes over *fds*. Raises UnknownSession for a session that is not the peer's, Lost where its
        engine is not up, Busy where the peer has too many lanes.
        """
        try:
            session = self._registry.session_of(peer, offer.session)
            engine = self._engines[session.engine]
            # One that is loading answers nobody for a while: over the bus its client is told of it.
            if engine.lease is None or engine.state is not states.Engine.READY:
                raise Lost(f"engine {engine.index} is {engine.state}")
            if sum(lane.peer is peer for lane in self._lanes.values()) >= LANES_LIMIT:
                raise Busy(f"{LANES_LIMIT} lanes are open: one to each engine is enough")
            self._last += 1
            try:
                engine.lease.send(Listen(self._last, peer.owner, peer.pid), *fds)
            except BlockingIOError as exc:
                raise Busy(f"engine {engine.index} takes no news now") from exc
            self._lanes[self._last] = LaneRecord(peer, engine.index)
            return self._last
        finally:
            close_all(fds)

    def end_of_peer(self, peer: Peer) -> None:
        """*peer* is gone: so are its lanes."""
        for number in [n for n, lane in self._lanes.items() if lane.peer is peer]:
            engine = self._engines[self._lanes.pop(number).engine]
            engine.post(Broken(number, "its client is gone"))

    def end_of_engine(self, engine: Engine, reason: str) -> None:
        """*engine* is gone: its clients learn why."""
        for number in [n for n, lane in self._lanes.items() if lane.engine == engine.index]:
            lease = self._lanes.pop(number).peer.lease
            if lease is not None:
                with contextlib.suppress(Lost, BlockingIOError):  # about to be found out
                    lease.send(Broken(number, reason))

    def broken(self, engine: Engine, number: int, on_gone: Callable[[Peer], None]) -> None:
        """*engine* says that the client at the end of a lane lies or does not read: drop it."""
        lane = self._lanes.get(number)
        if lane is not None and lane.engine == engine.index:
            on_gone(lane.peer)
