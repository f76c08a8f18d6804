"""Arenas that are made beside us: their pages take tens of milliseconds, which no run should wait for."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

from djinn_zmq.errors import ArenaFull, StartError
from djinn_zmq.memory.arena import OwnArena, Pool

_log = logging.getLogger(__name__)

AGAIN_S = 1.0  # after the system refused memory
WAITING = 4  # that are being made, one after the other

Grow = Callable[[int], "Future[OwnArena]"]  # makes an arena of so many bytes, its pages taken


class Growing:
    def __init__(self, pool: Pool, grow: Grow) -> None:
        self._pool = pool
        self._grow = grow
        self._coming: list[tuple[Future[OwnArena], int]] = []  # with their bytes
        self._from_s = 0.0  # monotonic: the system had no memory before

    def __bool__(self) -> bool:
        """Is one being made?"""
        return bool(self._coming)

    def begin(self, nbytes: int, zone: str) -> bool:
        """Begin to make an arena with room for *nbytes*. False where there may be none."""
        if len(self._coming) == WAITING or time.monotonic() < self._from_s:
            return False
        size = self._pool.may_grow(nbytes, zone)
        if size:
            self._pool.coming += size
            self._coming.append((self._grow(size), size))
        return bool(size)

    def expect(self, nbytes: int) -> None:
        """So much will be wanted soon of what nobody maps: a system gives fresh pages slowly."""
        missing = nbytes - self._pool.free("") - self._pool.coming
        while missing > 0 and self.begin(1, ""):
            missing -= self._coming[-1][1]

    def tend(self, zone: str) -> None:
        """Make the next arena in advance, where the last one is half full."""
        if not self._coming and not self._pool.ready(self._pool.arena_nbytes // 2, zone):
            self.begin(1, zone)

    def take(self) -> None:
        """Those that are made become the pool's."""
        for one in [one for one in self._coming if one[0].done()]:
            self._coming.remove(one)
            future, size = one
            self._pool.coming -= size
            try:
                self._pool.add(future.result())
            # The system, or CUDA, has no more, whatever the limit says.
            except (ArenaFull, StartError) as exc:
                _log.warning("no more host memory: %s", exc)
                self._from_s = time.monotonic() + AGAIN_S

    def wait(self) -> None:
        """For the first of them."""
        self._coming[0][0].exception()
        self.take()

    def close(self) -> None:
        for future, _ in self._coming:
            if future.exception() is None:
                future.result().close()
        self._coming.clear()
