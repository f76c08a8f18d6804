"""The engine's loop: take what has come, have one run get one layer (`working`), again.

One thread owns the device. Between two layers the loop looks at its inputs, so a ping or another
session's run waits for one layer, never for a whole prompt.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from djinn_zmq.bus.lane import Ends, Lane, Piece
from djinn_zmq.bus.lease import LeaseSocket, close_all
from djinn_zmq.bus.link import RINGFUL, Link
from djinn_zmq.bus.poll import Poll
from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.debugging import Debugging
from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.jobs import replies
from djinn_zmq.engine.jobs.forwards import Forwarder
from djinn_zmq.engine.jobs.job import EngineSession, Job, Part
from djinn_zmq.engine.jobs.looking import Looker
from djinn_zmq.engine.jobs.moving import Mover
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.jobs.sweeping import Sweeper
from djinn_zmq.engine.jobs.talks import Talker
from djinn_zmq.engine.jobs.tracing import Tracer
from djinn_zmq.engine.lanes import PING, TAG, Lanes
from djinn_zmq.engine.models import cards
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.notices import STOPS, Notices
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.stays import Stays
from djinn_zmq.engine.telling import Telling
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.engine.working import Work
from djinn_zmq.errors import (
    Busy,
    Cancelled,
    Closed,
    DjinnError,
    Lost,
    PromptError,
    ProtocolError,
    RequestError,
    RunError,
    UnknownCheckpoint,
    UnknownSession,
)
from djinn_zmq.settings import Settings
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import EXAMPLE_LIMIT, NOBODYS, OF_ANSWERS, OP, Header, Message
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import AwayReply

_log = logging.getLogger(__name__)

PIECES_LIMIT = 16 * 1024  # of one TOKENS reply: their text travels in its meta
FAREWELL_LIMIT = 1000  # characters
GIVE_WAY_S = 50e-6
FILLING_S = 1e-3
# Taken however many requests wait: they end some of them, or what those wait for.
WITHOUT_TURN = frozenset({Op.CANCEL, Op.MORE, Op.RELEASE})


class EngineLoop:
    def __init__(
        self, link: Link, lease: LeaseSocket, device: Device, settings: Settings, index: int
    ) -> None:
        self._link = link
        self._lease = lease
        self._device = device
        self._keeping = Keeping(settings, lease, index, device)
        self._runner = Runner(self._keeping)
        self._looker = Looker(self._keeping, self._runner)
        self._sweeper = Sweeper(self._keeping, self._runner)
        self._tracer = Tracer(self._keeping, self._runner)
        self._talker = Talker(self._keeping, self._runner)
        self._forwarder = Forwarder(self._keeping, self._runner, self._talker)
        self._mover = Mover(self._keeping, self._runner)
        self._models: dict[str, ServedModel] = {}
        self._sessions: dict[int, EngineSession] = {}
        self._turns = Turns()
        self._example: Piece = b""  # a request, of those that came
        self._poll = Poll(settings.spin_us)
        self._poll.meanwhile = self._rehearse
        self._lanes = Lanes(self._poll, settings, self._take_on_lane, self._on_broken_lane)
        self._answers = Answers(link, self._lanes, rings_server=self._poll.stays_awake)
        self._telling = Telling(self._answers, self._keeping, self._sessions)
        self._debugging = Debugging(
            self._keeping, self._runner, self._turns, self._answers, self._telling, self._sessions,
            self._model_of,
        )  # fmt: skip
        self._work = Work(
            self._turns, self._keeping, self._runner.loans, self._answers, self._telling,
            self._debugging, device,
        )  # fmt: skip
        self._stays = Stays(self._keeping, self._answers, self._telling, self._work.end_if_broken)
        self._settings = settings
        self._poll.watch_lane(link.lane, self._on_link)
        self._poll.watch(lease.socket, self._on_lease)
        self._poll.watch(self._keeping, self._keeping.settle)
        self._notices = Notices(
            link, device, self._keeping, self._answers, self._telling, self._turns, self._work, self._stays,
            self._debugging, self._models, self._sessions,
        )  # fmt: skip
        self._requests = {
            Op.PING: self._ping,
            Op.RUN: self._run,
            Op.RESUME: self._resume,
            Op.CANCEL: self._cancel,
            Op.RELEASE: self._release,
            Op.TOKENS: self._tokens,
            Op.MORE: self._more,
            Op.LOOK: self._run,
            Op.SWEEP: self._run,
            Op.TRACE: self._run,
            Op.CONTINUE: self._run,
            Op.GENERATE: self._run,
            Op.FORWARD: self._run,
            Op.CARD: self._card,
            Op.MOVE: self._run,
            Op.HOLD: self._hold,
            Op.RESTORE: self._run,
            Op.AWAY: self._away,
            Op.ATTACH: self._debugging.attach,
            Op.BREAKS: self._debugging.breaks,
            Op.GO_ON: self._run,
            Op.RUNS: self._debugging.runs,
        }
        self._begin: dict[int, Callable[..., tuple[Job, Iterator[Part | None]]]] = {
            Op.RUN: self._runner.begin,
            Op.RESUME: self._talker.resume,
            Op.LOOK: self._looker.begin,
            Op.SWEEP: self._sweeper.sweep,
            Op.TRACE: self._tracer.trace,
            Op.CONTINUE: self._talker.run,
            Op.GENERATE: self._talker.generate,
            Op.FORWARD: self._forwarder.begin,
            Op.MOVE: self._mover.move,
            Op.HOLD: self._mover.hold,
            Op.RESTORE: self._mover.restore,
            Op.GO_ON: self._debugging.go_on,
        }

    def serve(self) -> None:
        """Until the server is gone, which raises Lost."""
        keeping, work = self._keeping, self._work
        room, tiers, vault = keeping.room, keeping.tiers, keeping.vault
        limit = room.slabs.limit
        ready = messages.Ready(str(self._device.torch), os.getpid(), limit)
        self._answers.tell(Op.READY, ready)
        with torch.inference_mode():  # thread-local: entered where the work is done
            while True:
                if self._lease.late:  # what crossed a question: the socket is silent about it
                    self._on_lease()
                if self._link.lane.unrung:
                    self._link.lane.ring()
                wait_s = 0 if work.chores or self._stays else self._turns.until_s()
                if tiers.storing and (wait_s is None or wait_s > FILLING_S):
                    # Nobody waits for these copies, and a client that was just answered may have to share
                    # our CPU: awake, we would keep it from running.
                    wait_s = FILLING_S
                if wait_s == 0 and room.beside:
                    # A thread that waits for the interpreter wakes when we let go of it, in a system
                    # call, and finds that we have it back: for half a minute, on a machine that wakes
                    # slowly. Long enough asleep, and it gets it.
                    time.sleep(GIVE_WAY_S)
                if self._poll.stays_awake or self._settings.spin_us:
                    self._poll.may_spin = not room.beside  # the same
                self._poll.turn(wait_s)
                if self._stays:
                    self._stays.answer()
                if tiers.storing:
                    self._fill()
                if self._turns or work.chores:
                    work.step()
                if vault.gone:
                    vault.settle()
                if keeping.moves or vault.moves:
                    self._telling.moves()

    def _fill(self) -> None:
        """Go on with copies that nobody waits for: they may be the first to find the device broken."""
        try:
            self._keeping.tiers.fill()
        except Exception as exc:
            self._work.end_if_broken(exc)
            raise

    def close(self) -> None:
        self._lanes.close_all()
        self._poll.close()
        self._keeping.close()
        self._link.close()
        self._lease.close()

    # ---- taking

    def _on_link(self) -> bool:
        """Take one message of the server's. Is there more?"""
        frames = self._link.receive()
        if frames is None:
            return False
        begin_ns = time.perf_counter_ns()
        envelope, frame, buffers = frames
        if frame[OP] == PING:
            self._answers.soon(envelope)
        self._take(envelope, codec.peek(frame), frame, buffers, begin_ns)
        return self._link.lane.unfinished()

    def _hear_server(self) -> None:
        """Take all that it has said by now."""
        for _ in range(RINGFUL):
            if not self._on_link():
                return

    def _rehearse(self) -> None:
        """Read a request and make an answer once more, for nobody: what does that will not be cold when
        the next request is there."""
        if self._example:
            codec.decode(self._example)
        self._answers.rehearse()

    def _on_lease(self) -> None:
        # Not `receive`, which waits: what the socket spoke of may have been taken by a question since.
        for news in self._lease.news():
            self._on_news(*news)

    def _on_news(self, packet: object, fds: list[int]) -> None:
        """A packet of the server's on the lease socket."""
        if isinstance(packet, messages.Listen):
            self._lanes.listen(packet, fds)
            return
        close_all(fds)
        if isinstance(packet, messages.Broken):
            self._lanes.close(packet.lane)
        else:
            self._keeping.arenas.on_packet(packet)

    def _on_broken_lane(self, number: int, text: str) -> None:
        self._lease.send(messages.Broken(number, text))

    def _take_on_lane(
        self, envelope: bytes, owner: str, frame: bytes, buffers: Sequence[Piece], begin_ns: int
    ) -> None:
        """A message of a client's own, not passed on by the server: check what the server would."""
        header = NOBODYS
        if self._link.lane.unfinished():
            # What the server told its client, this session or a checkpoint it claimed, it told us before.
            self._hear_server()
        try:
            header = codec.peek(frame)
            if header.flags & OF_ANSWERS:
                raise ProtocolError("a reply nobody asked for")
            if len(frame) > self._settings.meta_limit:
                raise ProtocolError(f"a meta of {len(frame)} bytes is too long")
            session = self._sessions.get(header.session)
            if session is None or session.owner != owner:
                raise UnknownSession(
                    f"session {header.session:016x} does not exist or is not yours: it may have "
                    "been closed"
                )
            if (
                self._turns
                and len(self._turns.of(session)) >= self._settings.queue_limit
                and header.op not in WITHOUT_TURN
            ):
                raise Busy(f"{self._settings.queue_limit} requests of this session wait")
        except DjinnError as exc:
            if not header.flags & Flag.ONE_WAY:
                self._answers.refuse(envelope, header, exc)
        else:
            self._take(envelope, header, frame, buffers, begin_ns)

    def _take(
        self,
        envelope: bytes,
        header: Header,
        frame: bytes,
        buffers: Sequence[Piece],
        begin_ns: int,
    ) -> None:
        """begin_ns: when it was there."""
        try:
            message = codec.decode(frame, buffers, header)
            # A lane's may have overtaken what is still to be adopted.
            if self._notices.adopting and envelope[:1] != TAG:
                self._notices.finish_adopting(header.op)
            if envelope:
                if not buffers and len(frame) <= EXAMPLE_LIMIT:
                    self._example = frame
                self._request(envelope, message, begin_ns)
            else:
                self._notices.take(message)
        except DjinnError as exc:
            self._refuse(envelope, header, exc)
        except Exception as exc:  # noqa: BLE001  a tokenizer's code, or our own mistake
            self._work.end_if_broken(exc)
            _log.exception("%s failed", codec.name_of(header.op))
            if envelope:
                self._refuse(envelope, header, RunError(f"{type(exc).__name__}: {exc}"))

    def _refuse(self, envelope: bytes, header: Header, error: DjinnError) -> None:
        """Say so to whoever asked, if that is a client that wants an answer."""
        if not envelope:
            _log.error("the server's %s failed: %s", codec.name_of(header.op), error)
        elif header.flags & Flag.ONE_WAY:
            _log.debug("%s refused: %s", codec.name_of(header.op), error)
        else:
            self._answers.refuse(envelope, header, error)

    def _request(self, envelope: bytes, message: Message, begin_ns: int) -> None:
        if self._notices.stopping:
            raise Closed(STOPS)
        header = message.header
        session = self._sessions.get(header.session)
        if session is None:
            raise UnknownSession(f"session {header.session:016x} is not on this engine")
        handle = self._requests.get(header.op)
        if handle is None:
            raise ProtocolError(f"op {header.op} is not for an engine")
        handle(envelope, message, session, begin_ns)

    # ---- clients' requests

    def _ping(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        state = "running" if self._turns else "idle"
        pong = messages.Pong(state, time.perf_counter_ns() - begin_ns)
        self._answers.answer(envelope, message.header, pong)

    def _run(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        header = message.header
        if self._answers.again(envelope, header):
            return
        for active in self._turns.of(session):
            if active.header.request == header.request:
                active.envelope = envelope  # asked again while it runs: answer the newer asker
                return
        model = self._model_of(session)
        begin = self._begin[header.op]
        shared = bool(header.flags & Flag.SHARED)
        watch = Stopwatch(begin_ns)
        job, turns = begin(message.meta, message.buffers, session, model, watch, shared=shared)
        active = Active(job, turns, envelope, header, header.credit)
        self._turns.add(active)
        if session.attached is not None or self._debugging.tells:
            self._debugging.began(active)

    def _resume(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        asked: messages.Resume = message.meta
        try:
            if not self._debugging.tells:
                if self._answers.again(envelope, message.header):
                    return
                self._model_of(session)
                if self._stays.begin(
                    asked, message.buffers, session, envelope, message.header, begin_ns
                ):
                    return
        finally:  # a copy that is waited for is begun by now; a job may need the room
            if asked.released:
                self._let_go(session, asked.released)
        self._run(envelope, message, session, begin_ns)

    def _hold(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        """Memory is lent to the process that asks, which need not be the one that began the session."""
        lane = envelope[:1] == TAG
        session.asker = self._lanes.pid(envelope) if lane else session.pid
        self._run(envelope, message, session, begin_ns)

    def _model_of(self, session: EngineSession) -> ServedModel:
        model = self._models.get(session.model)
        if model is None:
            raise Lost(f'"{session.model}" could not be loaded again after the engine\'s restart')
        return model

    def _cancel(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        wanted = message.meta.request
        found = [one for one in self._turns.of(session) if one.header.request == wanted]
        for active in found:
            self._work.end(active, Cancelled(f"cancelled at layer {active.job.layer}"))
        ended = self._debugging.cancel(session, wanted)
        self._answers.answer(envelope, message.header, messages.Cancelled(bool(found) or ended))

    def _more(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        if not message.header.flags & Flag.ONE_WAY:
            raise ProtocolError("MORE is not answered: it is sent one way")
        for active in self._turns.of(session):
            if active.header.request == message.meta.request:
                active.credit += message.header.credit
                if active.held is not None:
                    self._turns.welcome(session)
                    self._work.hand_out(active)
                return
        self._debugging.more(session, message.meta.request, message.header.credit)

    def _release(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        """From a client with a lane; from others the server takes it, with an engine or without."""
        numbers = message.meta.ids
        if message.header.flags & Flag.ONE_WAY:
            self._let_go(session, numbers)
            return
        for number in numbers:
            if not self._has(session, number):
                raise UnknownCheckpoint.numbered(number)
        self._let_go(session, numbers)
        self._answers.answer(envelope, message.header, messages.Done())

    def _has(self, session: EngineSession, number: int) -> bool:
        return number in session.branches or self._keeping.has(number, session.id)

    def _let_go(self, session: EngineSession, numbers: Sequence[int]) -> None:
        """What a client's garbage collection finds may be gone already."""
        gone = tuple(number for number in numbers if self._has(session, number))
        self._notices.let_go(session, gone)
        self._answers.tell(Op.DROP, messages.Drop(gone), session.id)

    def _tokens(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        model = self._model_of(session)
        asked: messages.Tokens = message.meta
        if asked.ids is None:
            ids = model.encode((asked.text,))[0]
        else:
            ids = self._keeping.ids_sent(asked.ids, message.buffers, session.owner).reshape(-1)
            if ids.size:
                model.check_ids(ids.reshape(-1, 1))
        if ids.size > PIECES_LIMIT:
            raise PromptError(f"{ids.size} tokens to spell out: at most {PIECES_LIMIT} at once")
        meta, buffers = replies.of_tokens(ids, model.pieces(ids))
        self._answers.answer(envelope, message.header, meta, buffers)

    def _card(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        meta, buffers = cards.of(self._model_of(session))
        self._answers.answer(envelope, message.header, meta, buffers)

    def _away(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        expected_s: float = message.meta.expected_s
        if not 0 <= expected_s < float("inf"):
            raise RequestError(f"away for {expected_s} seconds: a number, or 0 for back soon")
        if expected_s:
            self._keeping.room.away(session.id, expected_s)
        else:
            self._keeping.room.expect(session.id)
            if not session.coming:  # who says it again while it is brought up brings nothing more
                for bringing in (self._keeping.tiers.back, self._keeping.vault.back):
                    session.coming += 1
                    self._work.chores.append(_coming(session, bringing(session.id)))
        self._answers.answer(envelope, message.header, AwayReply())

    def farewell(self, reason: str) -> None:
        """Tell the server why this process ends: it answers for what is owed."""
        self._lease.send(messages.Farewell(reason[:FAREWELL_LIMIT]))


def _coming(session: EngineSession, bringing: Iterator[None]) -> Iterator[None]:
    try:
        yield from bringing
    finally:
        session.coming -= 1


def connect(link: Ends, lease_fd: int, settings: Settings) -> tuple[Link, LeaseSocket]:
    """The two ends an engine is born with."""
    lease = LeaseSocket(socket.socket(fileno=lease_fd))
    lease.socket.setblocking(True)
    return Link(Lane(link, settings, first=False), lease_fd), lease
