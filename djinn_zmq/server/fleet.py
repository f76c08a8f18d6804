"""The engines together: which one serves a model, what happens when one dies."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from djinn_zmq.errors import Busy, DjinnError, Lost, from_wire
from djinn_zmq.memory.files import facts_of
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.engines import UP, Engine
from djinn_zmq.server.journal import Journal
from djinn_zmq.server.registry import KeptRecord, Peer, Registry, Session
from djinn_zmq.server.returned import Returned
from djinn_zmq.server.shelving import Shelving
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, states
from djinn_zmq.wire.attach import Happened, LetGo, Tell
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Adopt, Drop, Enter, Flag, Keep, Leave, Opened, Progress
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.talks import Held
from djinn_zmq.wire.tensors import Slot
from djinn_zmq.wire.tiers import Moved, Shelved, Unclaimed

_log = logging.getLogger(__name__)

STOP_S = 3.0  # an engine in the middle of a layer or of loading gets this long to end by itself

Reply = Callable[[bytes, bytes, Sequence[bytes | memoryview]], None]


@dataclass(slots=True, eq=False)
class Opening:
    """A client that waits for its model."""

    peer: Peer
    header: Header
    progress_left: int


class Fleet:
    def __init__(
        self,
        devices: Sequence[str],
        dtype: str,
        settings: Settings,
        registry: Registry,
        arenas: Arenas,
        journal: Journal,
        returned: Returned,
        reply: Reply,
    ) -> None:
        """reply: sends (envelope, frame, buffers) to a peer."""
        self.engines = [
            Engine(index, device, dtype, settings) for index, device in enumerate(devices)
        ]
        self._registry = registry
        self._arenas = arenas
        self._journal = journal
        self._returned = returned
        self._settings = settings
        self._reply = reply
        self._opening: dict[tuple[int, str], list[Opening]] = {}
        self.shelving = Shelving(self.engines, registry, settings)
        self._tells = False  # does anybody listen to what engines tell of runs?
        self.on_start: Callable[[Engine], None] = lambda engine: None  # a process runs
        registry.on_move = self._enter
        for engine in self.engines:
            engine.on_wanted = self._try_again

    def stop(self) -> None:
        """End them, all in the same time: each begins to end before any is waited for."""
        for engine in self.engines:
            engine.hang_up()
        end_s = time.monotonic() + STOP_S
        for engine in self.engines:
            engine.stop(max(0.0, end_s - time.monotonic()))

    # ---- models and sessions

    def load(self, name: str, source: str) -> Engine:
        """Have *name* loaded by the engine that has it, or else by the one with fewest models: of those that
        are not down, where there are any.

        Raises Lost where all stay down.
        """
        failed = states.Engine.FAILED
        engine = min(
            self.engines,
            key=lambda one: (
                one.state is failed,
                name not in one.sources,
                len(one.sources),
                one.index,
            ),
        )
        if engine.state is failed:
            self._try_again(engine)
        if name not in engine.sources:
            engine.load(name, source)
        return engine

    def open(self, peer: Peer, header: Header, name: str, source: str) -> None:
        """Open a session on *name*; the reply goes out now, or when the model is loaded.

        Raises Lost where all engines stay down, Busy where the owner waits for as many as it may have.
        """
        engine = self.load(name, source)
        if name in engine.models:
            self._opened(engine, peer, header, name)
            return
        limit = self._settings.sessions_limit
        waiting = itertools.chain(*self._opening.values())
        count = sum(one.peer.owner == peer.owner for one in waiting)
        if count >= limit:
            raise Busy(f"{count} sessions are waited for: at most {limit} for one owner")
        opening = Opening(peer, header, header.credit)
        self._opening.setdefault((engine.index, name), []).append(opening)
        self._tell_progress(opening, Progress(engine.detail or f"{name}: waiting", 0, 0))

    def _opened(self, engine: Engine, peer: Peer, header: Header, name: str) -> None:
        if self._registry.peers.get(peer.envelope) is not peer:
            return  # gone with the answer before this one: nobody would close its session
        try:
            session = self._registry.open(peer, name, engine.index)
            try:
                self._enter(session, peer)
            except DjinnError:  # of one that its engine does not know
                self._registry.close(session)
                raise
        except DjinnError as exc:
            self._reply(peer.envelope, codec.failure(header, exc), ())
            return
        session.info_of_model = engine.models[name]
        _log.info("session %016x of %s on %s begins", session.id, session.owner, name)
        self._tell_session(session, "begins")
        # Last: where its client is gone, that is found out here, and the session ends.
        self._answer(peer, header, Opened(session.id, engine.models[name], engine.index))

    def _answer(self, peer: Peer, header: Header, meta: Opened) -> None:
        frame = codec.encode(header.op, meta, flags=Flag.REPLY, request=header.request)
        self._reply(peer.envelope, frame, ())

    def _tell_progress(self, opening: Opening, progress: Progress) -> None:
        if opening.progress_left > 0:
            opening.progress_left -= 1
            frame = codec.encode(
                opening.header.op, progress, flags=Flag.PROGRESS, request=opening.header.request
            )
            self._reply(opening.peer.envelope, frame, ())

    def _enter(self, session: Session, peer: Peer | None, *, asked: bool = True) -> None:
        """Tell its engine of *session*, or of which process speaks for it from now on. Raises as `Engine.tell`."""
        pid = 0 if peer is None else peer.pid
        enter = Enter(session.owner, session.model, pid)
        self.engines[session.engine].tell(Op.ENTER, enter, session=session.id, asked=asked)

    def close(self, session: Session) -> None:
        """End *session*, wherever it stands: runs are cancelled, slots come back."""
        self._registry.close(session)
        self._arenas.staging(session.owner).reclaim(session.id)
        engine = self.engines[session.engine]
        try:
            engine.tell(Op.LEAVE, Leave(), session=session.id)
        except DjinnError as exc:
            _log.warning("session %016x ends without its engine: %s", session.id, exc)
        _log.info("session %016x of %s ends", session.id, session.owner)
        self._tell_session(session, "ends")

    def let_go(self, session: Session) -> None:
        """*session*'s client is gone, and may come back; what it holds as a debugger goes on now."""
        with contextlib.suppress(DjinnError):  # without an engine nothing is held
            self.engines[session.engine].tell(Op.LET_GO, LetGo(), session=session.id)

    def _tell_session(self, session: Session, what: str) -> None:
        text = f"session {session.id:016x} on {session.model} {what}"
        self._journal.tell("session", text, owner=session.owner, session=session.id)

    def retire(self, arenas: Sequence[int]) -> None:
        """These arenas are nobody's any more: engines that mapped them let go."""
        for engine in self.engines:
            for number in arenas:
                engine.retire(number)

    def forget_openings(self, peer: Peer) -> None:
        for waiting in self._opening.values():
            waiting[:] = [opening for opening in waiting if opening.peer is not peer]

    def refuse_openings(self, error: DjinnError) -> None:
        """Nobody's model is loaded any more."""
        openings = list(itertools.chain(*self._opening.values()))
        self._opening.clear()
        for opening in openings:
            self._reply(opening.peer.envelope, codec.failure(opening.header, error), ())

    # ---- what an engine says

    def on_message(self, engine: Engine, frame: bytes, buffers: Sequence[memoryview]) -> None:
        """A message of the engine's own, not a reply to a client."""
        message = codec.decode(frame, buffers)
        meta = message.meta
        if message.header.op == Op.READY:
            engine.on_ready(meta)
            text = f"engine {engine.index} is ready on {meta.device}, pid {meta.pid}"
            self._journal.tell("engine", text)
            self._tell_of_runs(engine)
            self._tell_unclaimed(engine)
        elif message.header.op == Op.LOAD:
            self._on_load(engine, message)
        elif isinstance(meta, Keep):
            self._on_keep(engine, message.header.session, meta)
        elif isinstance(meta, Held):
            session = self._registry.sessions.get(message.header.session)
            if session is not None:
                session.kv = meta.nbytes
                if meta.how:
                    self._tell_held(session, meta)
        elif isinstance(meta, Shelved):
            self.shelving.heard(engine, meta)
        elif isinstance(meta, Moved):
            self._on_moved(meta)
        elif isinstance(meta, Happened):
            self._on_happened(engine, message.header.session, meta)
        elif isinstance(meta, Drop):
            session = self._registry.sessions.get(message.header.session)
            for number in meta.ids if session is not None else ():
                session.kept.pop(number, None)

    def _on_keep(self, engine: Engine, session_id: int, meta: Keep) -> None:
        session = self._registry.sessions.get(session_id)
        if session is None:  # it ended while the run was on its way: nobody owns these
            engine.tell(Op.DROP, Drop(tuple(kept.id for kept in meta.kept)), session=session_id)
            return
        if meta.ids is not None:
            session.ids = meta.ids
        assert session.ids is not None  # an engine tells them with its first KEEP
        for kept in meta.kept:
            session.kept[kept.id] = KeptRecord(kept, session.ids)

    def _tell_held(self, session: Session, meta: Held) -> None:
        where = "in host memory" if meta.how == "evict" else "on the device"
        self._journal.tell(
            meta.how,
            f"keys and values of session {session.id:016x} are now {where}",
            owner=session.owner,
            session=session.id,
            nbytes=meta.moved,
            elapsed_ns=meta.elapsed_ns,
        )

    def tell_of_runs(self, wanted: bool) -> None:
        """Somebody listens to what runs begin and stop, or nobody does any more. Engines hear of the latter when
        they tell of something in vain: else who listens now and then, again and again, would fill the queue of
        one that does not read."""
        self._tells = wanted
        for engine in self.engines:
            if wanted and engine.state in UP:
                self._tell_of_runs(engine)

    def _tell_of_runs(self, engine: Engine) -> None:
        if engine.tells != self._tells:
            engine.tells = self._tells
            engine.tell(Op.TELL, Tell(engine.tells))

    def _on_happened(self, engine: Engine, session_id: int, meta: Happened) -> None:
        self._tell_of_runs(engine)
        session = self._registry.sessions.get(session_id)
        if session is not None:
            self._journal.tell(
                meta.kind,
                meta.text,
                owner=session.owner,
                session=session.id,
                elapsed_ns=meta.elapsed_ns,
            )

    def _on_moved(self, meta: Moved) -> None:
        kept = meta.kept
        session = self._registry.moved(kept)
        if session is not None:
            text = f"checkpoint {kept.id:#x} after layer {kept.layer} is now in {', '.join(kept.tiers)}"
            self._journal.tell(
                meta.how,
                text,
                owner=session.owner,
                session=session.id,
                nbytes=kept.tensor.nbytes,
                elapsed_ns=meta.elapsed_ns,
            )

    def _on_load(self, engine: Engine, message: codec.Message) -> None:
        header, meta = message.header, message.meta
        if header.flags & Flag.PROGRESS:
            if engine.state is states.Engine.READY:
                engine.advance("load")
            name = _named_in(meta.stage, engine)
            engine.loading = name
            engine.detail = meta.stage
            for opening in tuple(self._opening.get((engine.index, name), ())):  # some may be gone
                self._tell_progress(opening, meta)
            return
        if engine.state is states.Engine.LOADING:
            engine.advance("loaded")
        engine.detail = ""
        if header.flags & Flag.ERROR:
            name = _named_in(meta.text, engine)
            text = meta.text.removeprefix(f"{name}: ")
            engine.sources.pop(name, None)
            self._fail_openings(engine, name, from_wire(meta.code, f"{name}: {text}"))
        else:
            engine.models[meta.model.name] = meta.model
            _log.info("model %s is served by engine %d", meta.model.name, engine.index)
            for opening in self._opening.pop((engine.index, meta.model.name), ()):
                self._opened(engine, opening.peer, opening.header, meta.model.name)

    def _fail_openings(self, engine: Engine, name: str, error: DjinnError) -> None:
        _log.warning("model %s is not served: %s", name, error)
        for opening in self._opening.pop((engine.index, name), ()):
            self._reply(opening.peer.envelope, codec.failure(opening.header, error), ())

    # ---- the death of an engine

    def on_death(self, engine: Engine) -> Lost:
        """Start another, answer what it owed, and hand that one all that survived. Returns the answer."""
        owed, reason = engine.bury()
        self.shelving.gone(engine)
        self._journal.tell("engine", reason)
        if engine.state is states.Engine.FAILED:
            self._retire_arenas(engine)
        else:
            self._start(engine)
        # Only now is it known what to say; a start that works takes milliseconds here.
        failed = engine.state is states.Engine.FAILED
        kept = "checkpoints in host memory or on the disk are kept"
        answer = Lost(
            engine.why_down() if failed else f"{reason}; it is being started again, {kept}"
        )
        for envelope, header in owed:
            session = self._registry.sessions.get(header.session)
            if session is not None:
                session.waiting -= 1
            self._reply(envelope, codec.failure(header, answer), ())
        if failed:
            for index, name in [key for key in self._opening if key[0] == engine.index]:
                self._fail_openings(self.engines[index], name, answer)
            # One of the others may be what it died of: they are loaded when they are asked for.
            used = {session.model for session in self._registry.sessions_on(engine.index)}
            for name in engine.sources.keys() - used:
                del engine.sources[name]
            return answer
        self._restore(engine)
        return answer

    def _try_again(self, engine: Engine) -> None:
        """An engine that stayed down is asked for: start it once more. Raises Lost where that fails, and
        for a pause after it was given up."""
        if time.monotonic() >= engine.retry_s:
            self._start(engine)
        if engine.state is states.Engine.FAILED:
            raise Lost(engine.why_down())
        self._restore(engine)

    def _start(self, engine: Engine) -> None:
        """Start a process behind *engine*, with the arenas that hold something. It fails where that cannot be."""
        self._retire_arenas(engine)
        try:
            engine.start()
        except (DjinnError, OSError) as exc:  # memory, most likely: of what it died
            engine.give_up(str(exc))
        else:
            self.on_start(engine)

    def _retire_arenas(self, engine: Engine) -> None:
        """Of its dead process's arenas those stay that hold something."""
        survivors = [record for _, record in self._registry.kept_by(engine.index)]
        arenas = frozenset(
            record.kept.tensor.where.arena
            for record in survivors
            if isinstance(record.kept.tensor.where, Slot)
        )
        self._arenas.retire(engine.index, keep=arenas)

    def _restore(self, engine: Engine) -> None:
        """Hand what survived to its new process."""
        # Adoption comes first: the arenas that survive count against the new engine's limit.
        for session in self._registry.sessions_on(engine.index):
            self._enter(session, session.peer, asked=False)
            self._hand_over(engine, session)
        for name, source in engine.sources.items():
            engine.load(name, source)

    def adopt(self, session: Session, records: Sequence[KeptRecord]) -> None:
        """These files are checkpoints of *session* from now on."""
        engine = self.engines[session.engine]
        for record in records:
            session.kept[record.kept.id] = record
            meta = Adopt(record.ids, (record.kept,), _facts(session))
            engine.tell(Op.ADOPT, meta, session=session.id)
        for one in self.engines:
            if one.state in UP:
                self._tell_unclaimed(one)

    def _tell_unclaimed(self, engine: Engine) -> None:
        """Files that no session has yet are everybody's: each engine has room for its share less."""
        if self._settings.disk:
            share = -(-self._returned.nbytes // len(self.engines))
            engine.tell(Op.UNCLAIMED, Unclaimed(share))

    def _hand_over(self, engine: Engine, session: Session) -> None:
        def run_of(record: KeptRecord) -> int:
            return record.kept.run

        session.kv = 0  # died with the engine, and its branches with it
        # A reply's logits are not worth another engine's memory: their client has them or asks anew.
        for number in [n for n, record in session.kept.items() if record.kept.layer < 0]:
            del session.kept[number]
        for _, records in itertools.groupby(sorted(session.kept.values(), key=run_of), run_of):
            run = list(records)
            meta = Adopt(run[0].ids, tuple(record.kept for record in run), _facts(session))
            engine.tell(Op.ADOPT, meta, session=session.id)


def _facts(session: Session) -> tuple[tuple[str, str], ...]:
    return tuple(facts_of(session.info_of_model).items()) if session.info_of_model else ()


def _named_in(text: str, engine: Engine) -> str:
    """Which of the models *engine* was told to load the words "NAME: …" are about. A directory's
    name may hold anything, ": " too."""
    return max((name for name in engine.sources if text.startswith(f"{name}: ")), key=len)
