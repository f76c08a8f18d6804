"""Before the server stops: files for checkpoints that have none."""

import logging
import time
from collections.abc import Generator

from djinn_zmq.engine.state.room import Room
from djinn_zmq.engine.state.tiers import Tiers
from djinn_zmq.errors import DjinnError
from djinn_zmq.settings import format_bytes
from djinn_zmq.wire.tiers import Shelve

_log = logging.getLogger(__name__)

TELL_EVERY_S = 1.0


def shelve(room: Room, tiers: Tiers, asked: Shelve) -> Generator[None, None, dict[int, str]]:
    """Write them, the most recently used first. Returns which can have no file, and why."""
    wanted = [body for body in room.recent() if not body.checkpoints.isdisjoint(asked.ids)]
    begin_s = told_s = time.monotonic()
    total, done, files = sum(body.nbytes for body in wanted), 0, 0
    left: dict[int, str] = {}
    for body in wanted:
        if time.monotonic() - begin_s > asked.within_s:
            break  # the server has given up waiting
        try:
            yield from tiers.file(body)
        except DjinnError as exc:
            left.update(dict.fromkeys(body.checkpoints, str(exc)))
            continue
        done, files = done + body.nbytes, files + 1
        if time.monotonic() - told_s > TELL_EVERY_S:
            told_s = time.monotonic()
            shown = f"{format_bytes(done)} of {format_bytes(total)}"
            _log.info("%d of %d files are written, %s", files, len(wanted), shown)
    return left
