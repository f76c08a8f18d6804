"""Checkpoints' files, written by a thread beside the layers: begun, and taken note of when they are there."""

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.disk import Disk
from djinn_zmq.memory.files import MARK
from djinn_zmq.wire.tensors import over

_log = logging.getLogger(__name__)

Moved = Callable[[Body, str, int], None]  # a body, what was done ("evict", "prefetch"), nanoseconds


@dataclass(frozen=True, slots=True)
class _UnderWay:
    body: Body
    numbers: list[int]  # the checkpoints it had when the writing began
    future: "Future[Any]"
    begin_ns: int


class Writing:
    def __init__(self, disk: Disk, moved: Moved) -> None:
        self._disk = disk
        self._moved = moved
        self._under_way: list[_UnderWay] = []

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def wanted(self, body: Body) -> bool:
        """Can *body* have a file that it has not, and is there room for it?"""
        return bool(
            body.host and not body.disk and not body.unwritable and self._disk.fits(body.nbytes)
        )

    def begin(self, body: Body) -> None:
        """Begin to write *body*, which is in host memory; it is `moving` until `settle` finds the file there."""
        assert body.host is not None
        hidden = over(body.host.view, body.dtype, body.shape)
        arrays = {"hidden": hidden, "ids": body.ids}
        body.moving = True
        self._disk.used += body.nbytes
        numbers = sorted(body.checkpoints)
        body.facts[MARK] = secrets.token_hex(8)
        future = self._disk.save(numbers, arrays, body.facts)
        self._under_way.append(_UnderWay(body, numbers, future, time.perf_counter_ns()))

    def settle(self) -> list[Body]:
        """Take note of the files that are there by now, or could not be written; whose they are."""
        done = [one for one in self._under_way if one.future.done()]
        for one in done:
            self._under_way.remove(one)
            self._written(one)
        return [one.body for one in done]

    def _written(self, one: _UnderWay) -> None:
        body = one.body
        body.moving = False
        if (error := one.future.exception()) is not None:
            self._disk.used -= body.nbytes
            self._disk.trouble = str(error)
            _log.warning("a checkpoint could not be written to the disk: %s", error)
            body.unwritable = True
            return
        # The file is there under these numbers; meanwhile some may have gone and others come.
        for number in body.checkpoints.difference(one.numbers):
            self._disk.link(one.numbers[0], number)
        heir = min(body.checkpoints, default=0)
        for number in set(one.numbers) - body.checkpoints:
            self._disk.remove(number, heir)
        body.disk = heir or one.numbers[0]
        self._moved(body, "write", time.perf_counter_ns() - one.begin_ns)

    def clear(self) -> None:
        self._under_way.clear()
