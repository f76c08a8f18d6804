"""The last thing before an orderly stop: what sessions keep gets files in the state directory.

Engines write them (`engine/state/shelving.py`), the checkpoints used last first, as far as the disk's limit and the
time go. What the stop found is kept: clients that end meanwhile, of its refusals mostly, take nothing with
them. What is not kept is named in the log, with the reason.
"""

import logging
from collections.abc import Iterator, Sequence

from djinn_zmq.server.engines import UP, Engine
from djinn_zmq.server.registry import STRANGER, KeptRecord, Registry, Session
from djinn_zmq.settings import Settings, counted, format_bytes
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Shelve, Shelved

_log = logging.getLogger(__name__)

NO_TIME = "there was no time"


class Shelving:
    def __init__(self, engines: Sequence[Engine], registry: Registry, settings: Settings) -> None:
        self.waiting: set[int] = set()  # engines that are at it
        self._engines = engines
        self._registry = registry
        self._settings = settings
        self._reasons: dict[int, str] = {}

    def begin(self) -> None:
        """Have engines write. Those that are done, or gone, leave `waiting`."""
        missing = [one for one in self._checkpoints() if not _why_not(*one)]
        missing = [one for one in missing if "disk" not in one[1].kept.tiers]
        for engine in self._engines:
            mine = tuple(one.kept.id for session, one in missing if session.engine == engine.index)
            if mine and engine.state in UP:
                engine.tell(Op.SHELVE, Shelve(mine, self._settings.stop_s))
                self.waiting.add(engine.index)
        if self.waiting:
            _log.info(
                "%s (%s) to be written to %s before the end, for at most %g s; a second Ctrl-C or SIGTERM "
                "leaves what is left",
                counted(len(missing), "checkpoint"),
                format_bytes(sum(record.kept.tensor.nbytes for _, record in missing)),
                self._settings.state,
                self._settings.stop_s,
            )

    def heard(self, engine: Engine, said: Shelved) -> None:
        self.waiting.discard(engine.index)
        self._reasons.update(said.left)

    def gone(self, engine: Engine) -> None:
        self.waiting.discard(engine.index)

    def name(self) -> None:
        """Say in the log what outlives the server, and what does not."""
        kept, left = list[int](), dict[str, list[int]]()
        for session, record in self._checkpoints():
            why, number = _why_not(session, record), record.kept.id
            if not why and "disk" in record.kept.tiers:
                kept.append(number)
                continue
            left.setdefault(why or self._reasons.get(number, NO_TIME), []).append(number)
        if kept:
            _log.info("kept in %s: %s", self._settings.state, counted(len(kept), "checkpoint"))
        for why, numbers in left.items():
            _log.warning(
                "not kept: %s: %s: %s",
                counted(len(numbers), "checkpoint"),
                why,
                ", ".join(f"{number:x}" for number in numbers),
            )

    def _checkpoints(self) -> Iterator[tuple[Session, KeptRecord]]:
        for session in self._registry.sessions.values():
            # Nobody but their checkpoint knows of inputs.
            inputs = {record.kept.base for record in session.kept.values()}
            for number, record in session.kept.items():
                if record.kept.layer >= 0 and number not in inputs:
                    yield session, record


def _why_not(session: Session, record: KeptRecord) -> str:
    """Why a file would be of no use to anybody; "": it would."""
    if session.owner.startswith(STRANGER):
        return "connections without a key are over with the server"
    if record.kept.past:
        return "they go on from keys and values, which are no part of a file"
    if record.kept.place:
        return "they are inside a layer, or the model's ends, and need more than a file holds"
    return ""
