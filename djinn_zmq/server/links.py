"""What the engines say, and how each ends: the server's ends of their links and lease sockets.

link           replies, notices     a reply goes back by the envelope in front, a notice to the fleet
lease socket   arenas, last words   its end of file is the engine's death
"""

import contextlib
from collections.abc import Callable

from djinn_zmq.bus.lease import close_all
from djinn_zmq.bus.link import RINGFUL
from djinn_zmq.bus.poll import Poll
from djinn_zmq.errors import DjinnError, Lost, ProtocolError
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.engines import Engine
from djinn_zmq.server.fleet import Fleet, Reply
from djinn_zmq.server.lanes import Lanes
from djinn_zmq.server.registry import Peer, Registry
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import Broken, Farewell, Flag

UNFINISHED = int(Flag.PROGRESS | Flag.PART)  # of messages after which the answer is still to come


class Links:
    def __init__(
        self,
        poll: Poll,
        registry: Registry,
        fleet: Fleet,
        lanes: Lanes,
        arenas: Arenas,
        reply: Reply,
        on_gone: Callable[[Peer], None],
    ) -> None:
        """reply: sends (envelope, frame, buffers) to a peer. on_gone: called with a peer that is of no use."""
        self._poll = poll
        self._registry = registry
        self._fleet = fleet
        self._lanes = lanes
        self._arenas = arenas
        self._reply = reply
        self._on_gone = on_gone

    def watch(self, engine: Engine) -> None:
        """A process runs: take what it says from now on."""
        link, lease = engine.link, engine.lease
        assert link is not None and lease is not None
        self._poll.watch_lane(link.lane, self._on_link, engine)
        self._poll.watch(lease.socket, self._on_lease, engine)
        lease.on_full = lambda: self._poll.watch_room(lease.socket, True)

    def hear_all(self) -> None:
        """A client with a lane may have its engine's answer before we have its word on what is kept.
        It is there already: the engine sends it first."""
        for engine in self._fleet.engines:
            self._hear(engine)

    def _hear(self, engine: Engine) -> None:
        """Take all that the engine has said by now."""
        for _ in range(RINGFUL):
            if not self._on_link(engine):
                return

    def _on_link(self, engine: Engine) -> bool:
        """Take one message of *engine*'s. Is there more?"""
        link = engine.link
        try:
            frames = link.receive() if link is not None and link.of_use else None
            if frames is None:
                return False
            envelope, frame, buffers = frames
            if envelope:
                self._reply(envelope, frame, buffers)  # first: its client waits, the rest can
                header = codec.peek(frame)
                key = header.session, header.request
                if not header.flags & UNFINISHED and engine.owed.pop(key, None):
                    session = self._registry.sessions.get(header.session)
                    if session is not None:
                        session.waiting -= 1
            else:
                self._fleet.on_message(engine, frame, buffers)
            return link.lane.unfinished()
        except ProtocolError as exc:  # its memory is not what it was: who follows has its own
            engine.farewell = f"was ended, because its link made no sense: {exc}"
            assert link is not None and engine.lease is not None
            link.of_use = False
            self._poll.unwatch(link.lane)
            engine.lease.hang_up()
            return False

    def _on_lease(self, engine: Engine) -> None:
        lease = engine.lease
        if lease is None:
            return
        try:
            with contextlib.suppress(Lost):  # what it said before it went is still to be read
                if lease.unsent and lease.flush():
                    self._poll.watch_room(lease.socket, False)
            packet, fds = lease.receive()
            if isinstance(packet, Farewell):
                close_all(fds)
                engine.farewell = f"ended itself: {packet.text}"
            elif isinstance(packet, Broken):
                close_all(fds)
                self._lanes.broken(engine, packet.lane, self._on_gone)
            else:
                self._arenas.answer(lease, packet, fds, engine.index)
        except BlockingIOError:
            return
        except (DjinnError, OSError):
            self._on_end(engine)

    def _on_end(self, engine: Engine) -> None:
        assert engine.link is not None and engine.lease is not None
        self._hear(engine)  # what it still said before it died
        self._poll.unwatch(engine.link.lane)
        self._poll.unwatch(engine.lease.socket)
        self._lanes.end_of_engine(engine, str(self._fleet.on_death(engine)))
