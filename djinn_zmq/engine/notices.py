"""What the server tells an engine, of itself and unasked: models to load, sessions that come and go, checkpoints
that are dropped or handed over, and that all is to be written because the server stops.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from djinn_zmq.bus.link import Link
from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.debugging import Debugging
from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.models import loading
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.state.shelving import shelve
from djinn_zmq.engine.stays import Stays
from djinn_zmq.engine.telling import Telling
from djinn_zmq.engine.turns import Turns
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import Cancelled, Closed, DjinnError
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import view
from djinn_zmq.wire.tiers import Shelve, Shelved

_log = logging.getLogger(__name__)

STOPS = "the server stops"


class Notices:
    """adopting: what a dead engine kept is being handed over. stopping: requests are taken no more."""

    def __init__(
        self,
        link: Link,
        device: Device,
        keeping: Keeping,
        answers: Answers,
        telling: Telling,
        turns: Turns,
        work: Work,
        stays: Stays,
        debugging: Debugging,
        loaded: dict[str, ServedModel],
        sessions: dict[int, EngineSession],
    ) -> None:
        """loaded, sessions: the engine's own, which are kept here."""
        self._link = link
        self._device = device
        self._keeping = keeping
        self._answers = answers
        self._telling = telling
        self._turns = turns
        self._work = work
        self._stays = stays
        self._debugging = debugging
        self._models = loaded
        self._sessions = sessions
        self.adopting = False
        self.stopping = False
        self._takes: dict[int, Callable[[Message], None]] = {
            Op.LOAD: self._load,
            Op.ENTER: self._enter,
            Op.LEAVE: self._leave,
            Op.DROP: self._drop,
            Op.ADOPT: self._adopt,
            Op.LET_GO: self._let_go_of_held,
            Op.TELL: debugging.tell,
            Op.UNCLAIMED: self._unclaimed,
            Op.SHELVE: self._shelve,
        }

    def take(self, message: Message) -> None:
        """Do what it says. Raises DjinnError where that cannot be."""
        self._takes[message.header.op](message)

    def let_go(self, session: EngineSession, numbers: Sequence[int]) -> None:
        """End what is the session's own: checkpoints, logits, holds, branches."""
        self._keeping.drop(numbers, session.id)
        for number in numbers:
            session.branches.pop(number, None)
        self._telling.held(session)

    def finish_adopting(self, op: int) -> None:
        """A message of *op* has come: anything but more of what is handed over ends that."""
        if op not in (Op.ADOPT, Op.ENTER):
            self.adopting = False
            self._keeping.finish_adopting()

    # ---- models

    def _load(self, message: Message) -> None:
        asked: messages.Load = message.meta

        def report(stage: str, done: int, total: int) -> None:
            progress = messages.Progress(stage, done, total)
            self._link.send(b"", codec.encode(Op.LOAD, progress, flags=Flag.PROGRESS))

        try:
            model = loading.load(asked, self._device, report)
        except DjinnError as exc:
            named = type(exc)(f"{asked.name}: {exc}")
            self._link.send(b"", codec.failure(message.header, named))
            return
        except Exception as exc:  # noqa: BLE001  a model's own code may raise anything
            _log.exception("loading %s failed", asked.name)
            named = loading.ModelRefused(f"{asked.name}: {type(exc).__name__}: {exc}")
            self._link.send(b"", codec.failure(message.header, named))
            return
        self._models[asked.name] = model
        with suppress(DjinnError, OSError):  # the first run will say what is wrong
            self._keeping.arenas.prepare()
        reply = messages.Loaded(model.info)
        self._link.send(b"", codec.encode(Op.LOAD, reply, flags=Flag.REPLY))

    # ---- sessions

    def _enter(self, message: Message) -> None:
        number, meta = message.header.session, message.meta
        known = self._sessions.get(number)
        if known is not None:  # another process speaks for it from now on
            known.pid = meta.pid
            return
        self._sessions[number] = EngineSession(number, meta.owner, meta.model, meta.pid)

    def _leave(self, message: Message) -> None:
        number = message.header.session
        closed = Cancelled("its session was closed")
        for active in self._turns.of(number):
            self._work.end(active, closed)
        self._stays.end(number, closed)
        session = self._sessions.pop(number, None)
        if session is not None:
            self._debugging.leave(session)
        self._answers.forget(number)
        self._keeping.drop_session(number)

    def _let_go_of_held(self, message: Message) -> None:
        session = self._sessions.get(message.header.session)
        if session is not None:
            self._debugging.let_go(session)

    # ---- what is kept

    def _drop(self, message: Message) -> None:
        session = self._sessions.get(message.header.session)
        if session is None:
            self._keeping.drop(message.meta.ids, message.header.session)
        else:
            self.let_go(session, message.meta.ids)

    def _adopt(self, message: Message) -> None:
        self.adopting = True
        session = self._sessions[message.header.session]
        ids = np.array(view(message.meta.ids, message.buffers))
        meta: messages.Adopt = message.meta
        lost = self._keeping.adopt(meta.kept, ids, session.owner, dict(meta.facts))
        if lost:
            numbers = ", ".join(map(hex, lost))
            _log.warning(
                "of session %016x is lost, for no copy outlived its engine: %s", session.id, numbers
            )
            self._answers.tell(Op.DROP, messages.Drop(tuple(lost)), session.id)

    def _unclaimed(self, message: Message) -> None:
        self._keeping.disk.unclaimed = message.meta.nbytes

    def _shelve(self, message: Message) -> None:
        self.stopping = True
        for number in self._sessions:
            for active in self._turns.of(number):
                self._work.end(active, Closed(STOPS))
            self._stays.end(number, Closed(STOPS))
        self._work.chores.append(self._shelving(message.meta))

    def _shelving(self, asked: Shelve) -> Iterator[None]:
        left: dict[int, str] = {}
        try:
            left = yield from shelve(self._keeping.room, self._keeping.tiers, asked)
        finally:
            self._telling.moves()
            reply = Shelved(tuple(left.items()))
            self._link.send(b"", codec.encode(Op.SHELVE, reply, flags=Flag.REPLY))
