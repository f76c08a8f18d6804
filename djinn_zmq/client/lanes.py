"""A client's lanes: one to each engine it has sessions on, beside the bus and by itself.

A lane is made when a session's first request is sent, and offered to the server, which introduces it
to the engine. Where there can be none (a server of another user or machine, an engine that is just
starting) the bus serves, and the next request tries again.
"""

import select
import time
from collections.abc import Callable, Iterator

from djinn_zmq.bus.lane import CAPACITY, SOON_NS, Lane
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.errors import ArenaFull, DjinnError, Lost
from djinn_zmq.settings import Settings
from djinn_zmq.wire.codec import Whole
from djinn_zmq.wire.messages import Broken, Offer

AT_ONCE = 16  # descriptors told of at once; for epoll's default of 1023 each wait allocates 12 KiB
RETRY_S = 0.2  # between two offers that the server could not pass on


class Lanes:
    def __init__(
        self,
        sharing: Sharing,
        settings: Settings,
        *,
        wanted: bool,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """wanted: False keeps everything on the bus. on_change: after a lane was made, and before
        one is closed."""
        self._sharing = sharing
        self._settings = settings
        self.wanted = wanted  # False: none will ever be had
        self._on_change = on_change
        self._spin_ns = settings.spin_us * 1000
        self._engines: dict[int, int] = {}  # by session
        self._lanes: dict[int, Lane] = {}  # by engine
        self._numbers: dict[int, int] = {}  # the server's number of a lane → its engine
        self._refused: dict[int, float] = {}  # by engine: when, monotonic
        self._asked: Lane | None = None  # of the last request
        self._epoll: select.epoll | None = None  # of the lease socket and all bells

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def know(self, session: int, engine: int) -> None:
        """*session* is served by the engine of that index."""
        self._engines[session] = engine

    def engine_of(self, session: int) -> int | None:
        """Which engine serves *session*; None where none is known to."""
        return self._engines.get(session)

    def forget(self, session: int) -> None:
        """*session* ends: what is still asked of it goes to the server, which knows that first."""
        self._engines.pop(session, None)

    def of(self, session: int) -> Lane | None:
        """The lane that *session*'s requests take; None: they take the bus."""
        engine = self._engines.get(session) if self.wanted else None
        if engine is None:
            return None
        lane = self._lanes.get(engine)
        self._asked = self._make(session, engine) if lane is None else lane
        return self._asked

    def _make(self, session: int, engine: int) -> Lane | None:
        lease = self._sharing.lease
        if lease is None or time.monotonic() - self._refused.get(engine, 0.0) < RETRY_S:
            return None
        try:
            if self._epoll is None:
                epoll = select.epoll()
                epoll.register(lease.socket, select.EPOLLIN)
                self._epoll = epoll  # not one that would never hear of the engine's end
            lane, theirs = Lane.create(CAPACITY, self._settings)
        except (ArenaFull, OSError):  # no memory for it now, or no descriptors: the bus needs none
            self._refused[engine] = time.monotonic()
            return None
        try:
            granted, _ = lease.ask(Offer(session), *theirs)
            self._epoll.register(lane, select.EPOLLIN | select.EPOLLET)
        except BaseException as exc:  # a KeyboardInterrupt too: nobody would close it
            lane.close()
            if not isinstance(exc, (DjinnError, OSError)):
                raise
            self._refused[engine] = time.monotonic()
            return None
        finally:
            theirs.close()
        self._lanes[engine] = lane
        self._numbers[granted.arena] = engine
        self._on_change()
        return lane

    def wake(self) -> None:
        """Have the engine that was asked last wake up while a request, most likely to it, is made."""
        if self._asked is not None:
            self._asked.ring()

    def disturbed(self) -> bool:
        """Has something come on the lease socket: perhaps that an engine is gone?"""
        if self._epoll is None or self._sharing.lease is None:
            return False
        spoke = self._epoll.poll(0, AT_ONCE)
        return bool(spoke) and self._sharing.lease.socket.fileno() in dict(spoke)

    def hear(self, lane: Lane, timeout_s: float) -> Whole | None:
        """The next message on *lane*; waits for it. None where nothing has come after *timeout_s*,
        or something came on the lease socket. Raises ProtocolError for what is no message."""
        frames = lane.receive()
        if frames is None:
            if not (self._spin_ns and lane.comes(self._spin_ns)):
                self._sleep(lane, timeout_s)
            frames = lane.receive()
        return frames

    def _sleep(self, lane: Lane, timeout_s: float) -> None:
        """Until *lane* has something, its engine is gone, or time is up."""
        assert self._epoll is not None
        spoke = self._epoll.poll(timeout_s, AT_ONCE)
        if len(spoke) != 1 or spoke[0][0] != lane.fileno() or not lane.rung_ahead():
            return  # among them a bell that tells of room, for the rest of what was sent
        if not lane.comes(SOON_NS):
            self._epoll.poll(timeout_s, AT_ONCE)

    def on_broken(self, news: Broken) -> tuple[Lane, Lost] | None:
        """The engine at the other end is gone: the lane that is of no use now, and why."""
        engine = self._numbers.pop(news.lane, None)
        lane = None if engine is None else self._lanes.pop(engine, None)
        return None if lane is None else (lane, Lost(news.text))

    def drop(self, lane: Lane) -> None:
        """Close *lane*, which is of no use any more. What is asked next takes the bus, or another lane."""
        for engine in [engine for engine, one in self._lanes.items() if one is lane]:
            # Its engine lives, as far as is known, and what is asked next may get it another lane.
            del self._lanes[engine]
            self._numbers = {n: other for n, other in self._numbers.items() if other != engine}
            self._refused[engine] = time.monotonic()
        self._on_change()
        if self._epoll is not None:
            self._epoll.unregister(lane)
        if lane is self._asked:
            self._asked = None
        lane.close()

    def leave(self) -> None:
        """In a child that was forked: the lanes are its parent's, and so is what their epoll waits for."""
        self.wanted = False
        self._lanes.clear()
        self._asked = None
        self._epoll = None

    def close(self) -> None:
        while self._lanes:
            self.drop(self._lanes.popitem()[1])
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
