"""Debuggers: sessions attached to other sessions, whose runs they hold at breakpoints.

    program  RUN ───────────────── layer 2 ┄┄┄┄┄ held ┄┄┄┄┄ layer 3 ── … ── reply
    debugger ATTACH ─────────────── part: Stopped ── looks ── GO_ON ── … ── reply: Detached

The run stays the program's: its request is on its way all the time, and time is all it sees. It gets no
turns while it is held, and its deadline stands still. What is kept at a stop is the debugger's. Nothing
a debugger asks for can make the program's run fail: what goes wrong ends the attachment.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.attachments import Attachment
from djinn_zmq.engine.jobs import replies
from djinn_zmq.engine.jobs.branches import TalkJob
from djinn_zmq.engine.jobs.job import DoneJob, EngineSession, Halt, Job
from djinn_zmq.engine.jobs.plans import Start
from djinn_zmq.engine.jobs.runs import Runner, check_hidden
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.telling import Telling
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.errors import (
    Busy,
    DjinnError,
    EditError,
    RequestError,
    UnknownSession,
    UnknownStop,
)
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.attach import (
    BEGUN,
    Attach,
    Breaks,
    Detached,
    GoOn,
    Happened,
    RunInfo,
    RunsReply,
    Stopped,
)
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.edits import Skip
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.stops import NOTHING, Break
from djinn_zmq.wire.tensors import inline

_log = logging.getLogger(__name__)

NO_IDS = np.zeros((1, 0), np.int64)
BREAKS_LIMIT = 256
# What stops at breakpoints, and what passes them: rows of a batch.
HELD = frozenset({Op.RUN, Op.RESUME, Op.CONTINUE, Op.GENERATE, Op.FORWARD})
PASSING = frozenset({Op.SWEEP, Op.TRACE})


class Debugging:
    """All attachments of an engine."""

    def __init__(
        self,
        keeping: Keeping,
        runner: Runner,
        turns: Turns,
        answers: Answers,
        telling: Telling,
        sessions: dict[int, EngineSession],
        model_of: Callable[[EngineSession], ServedModel],
    ) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans
        self._turns = turns
        self._answers = answers
        self._telling = telling
        self._sessions = sessions
        self._model_of = model_of
        self._attachments: list[Attachment] = []
        self._held: dict[int, tuple[Attachment, Active, Halt]] = {}  # by the stop's number
        self._last = 0
        self.tells = False  # of runs that begin and stop: somebody listens

    # ---- a debugger's requests

    def attach(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        asked: Attach = message.meta
        target = self._sessions.get(asked.target)
        if target is None or target.owner != session.owner:
            raise UnknownSession(
                f"session {asked.target:016x} does not exist on this engine or is not yours"
            )
        if target is session:
            raise RequestError("a session cannot be attached to itself")
        if target.model != session.model:
            raise RequestError(
                f'session {asked.target:016x} is on "{target.model}": attach to it from a session on '
                "that model"
            )
        if target.attached is not None:
            raise Busy(f"session {asked.target:016x} has a debugger already: one at a time")
        self._check(asked.breaks, session)
        attachment = Attachment(
            session,
            target,
            envelope,
            message.header,
            message.header.credit,
            self._runner,
            self._keeping,
            self._fail,
            asked.breaks,
        )
        self._attachments.append(attachment)
        target.attached = attachment
        self._say(attachment, BEGUN, 0)

    def breaks(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        asked: Breaks = message.meta
        attachment = self._of(session, asked.request)
        if attachment is None:
            raise RequestError("it is attached to nothing any more")
        self._check(asked.breaks, session)
        attachment.breaks = asked.breaks
        self._answers.answer(envelope, message.header, messages.Done())

    def _check(self, breaks: tuple[Break, ...], session: EngineSession) -> None:
        """Raises LayerError, StopError, RequestError for what no run can be held at."""
        if len(breaks) > BREAKS_LIMIT:
            raise RequestError(f"{len(breaks)} breakpoints: at most {BREAKS_LIMIT}")
        start = Start(0, fresh=True, step=0, again=True)
        self._runner.planner.holds(breaks, start, self._model_of(session), NO_IDS)

    def go_on(
        self,
        asked: GoOn,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[Job, Iterator[None]]:
        """A job that lets a held run go on. Raises UnknownStop, EditError; then it is still held."""
        with watch.span("decode"):
            halt = self._halt_of(asked.stop, session)
            changed = asked.hidden is not None or bool(asked.edits)
            if changed and halt.fixed:
                raise EditError(halt.fixed)
            for edit in asked.edits:
                if isinstance(edit, Skip):
                    raise EditError(
                        f"Skip({edit.layer!r}): a run under way goes through all its layers; edit what flows there"
                    )
            if asked.hidden is not None:
                check_hidden(asked.hidden, halt.kept[-1].tensor)
            sources = self._runner.sources(session, asked.edits)
        job = DoneJob(session, model, halt.job.ids, halt.job.layer, NOTHING, shared, watch)
        self._loans.read(job, asked.hidden, asked.edits)
        self._loans.hold(job, sources.values())

        def work() -> Iterator[None]:
            job.advance("start")
            value = halt.value
            if asked.hidden is not None:
                value = self._keeping.see_sent(asked.hidden, buffers, session.owner).clone()
                self._keeping.check_sent(asked.hidden)  # a CPU has copied it by now
            elif changed:
                value = value.clone()
            for source in sources.values():
                yield from self._loans.lend(job, source)
            if asked.edits:
                with watch.span("edit"):
                    value = self._runner.edited(session, asked.edits, buffers, sources, value)
            if self._halt_of(asked.stop, session) is halt:
                halt.value = value
                self._let_go(asked.stop)
            if changed:  # what was sent lies in its client's memory, which is its own again then
                yield from self._loans.until_done(job)
            job.advance("finish")

        return job, self._loans.settling(job, work())

    def _halt_of(self, stop: int, session: EngineSession) -> Halt:
        held = self._held.get(stop)
        if held is None or held[0].debugger is not session:
            raise UnknownStop(
                f"nothing is held at stop {stop}: it goes on already, or its program gave it up"
            )
        return held[2]

    def runs(
        self, envelope: bytes, message: Message, session: EngineSession, begin_ns: int
    ) -> None:
        attached = session.attached
        debugger = attached.debugger.id if isinstance(attached, Attachment) else 0
        found = tuple(_info(active) for active in self._turns.of(session))
        self._answers.answer(envelope, message.header, RunsReply(found, debugger))

    def more(self, session: EngineSession, request: int, credit: int) -> None:
        """The debugger takes so many more stops."""
        attachment = self._of(session, request)
        if attachment is not None:
            attachment.credit += credit
            self._hand_out(attachment)

    def cancel(self, session: EngineSession, request: int) -> bool:
        """Detach, if *request* is an attachment of *session*'s."""
        attachment = self._of(session, request)
        if attachment is not None:
            self._end(attachment, "detached")
        return attachment is not None

    def _of(self, session: EngineSession, request: int) -> Attachment | None:
        return next(
            (
                one
                for one in self._attachments
                if one.debugger is session and one.header.request == request
            ),
            None,
        )

    # ---- what happens to the program's runs

    def tell(self, message: Message) -> None:
        """From the server: does anybody listen to what runs begin and stop?"""
        self.tells = message.meta.runs

    def _happened(self, kind: str, active: Active, text: str, elapsed_ns: int = 0) -> None:
        what = f"{_kind(active.header.op)} {active.header.request & 0xFFFFF:x}"
        happened = Happened(kind, f"{what}: {text}", elapsed_ns)
        self._answers.tell(Op.HAPPENED, happened, active.job.session.id)

    def began(self, active: Active) -> None:
        """A job begins; of an attached session, one that does not stop says so to the debugger."""
        attached, op = active.job.session.attached, active.header.op
        if self.tells and op in HELD:
            batch, positions = active.job.ids.shape
            tokens = f"{batch} × {positions}" if batch > 1 else str(positions)
            kind = "resume" if op == Op.RESUME else "run"
            self._happened(kind, active, f"begins at layer {active.job.layer}, {tokens} tokens")
        if isinstance(attached, Attachment) and op not in HELD and op in PASSING:
            self._say(attached, _kind(op), active.header.request)

    def _say(self, attachment: Attachment, kind: str, request: int) -> None:
        none = inline(NO_IDS)
        said = Stopped(0, request, kind, 0, 0, -1, none, none, ())
        attachment.waiting.append((said, []))
        self._hand_out(attachment)

    def ended(self, active: Active) -> None:
        """It has been answered."""
        job, op = active.job, active.header.op
        if op in HELD:
            stopped = str(job.state) == "stopped"
            text = f"stopped after layer {job.layer}" if stopped else "finished"
            self._happened("stop" if stopped else "run", active, text, job.watch.elapsed_ns())

    def hold(self, active: Active) -> None:
        """*active* has yielded a Halt: tell the debugger, and wait."""
        halt = active.held
        assert isinstance(halt, Halt)
        active.held = None
        attachment = active.job.session.attached
        if not isinstance(attachment, Attachment) or attachment.over:
            return
        job = active.job
        self._last += 1
        attachment.stops += 1
        halt.number, halt.since_ns = self._last, time.perf_counter_ns()
        active.halt = halt
        self._held[halt.number] = attachment, active, halt
        self._telling.kept(job.ids, halt.kept, attachment.debugger)
        buffers: list[bytes | memoryview] = []
        before = NO_IDS
        if isinstance(job, TalkJob):
            before = job.tokens[:, : job.tokens.shape[1] - job.ids.shape[1]]
        stopped = Stopped(
            number=halt.number,
            request=active.header.request,
            kind=_kind(active.header.op),
            run=job.id,
            layer=job.layer,
            step=-1 if job.step_now is None else job.step_now,
            before=replies.place(before, buffers),
            ids=replies.place(job.ids, buffers),
            checkpoints=tuple(halt.kept),
        )
        attachment.waiting.append((stopped, buffers))
        self._hand_out(attachment)
        self._tell_program(active, held=True)
        place = halt.kept[-1].place
        where = f"at {place}" if place else f"after layer {job.layer}"
        self._happened("stop", active, f"held by a debugger {where}")

    def _hand_out(self, attachment: Attachment) -> None:
        while attachment.waiting and attachment.credit > 0:
            attachment.credit -= 1
            meta, buffers = attachment.waiting.popleft()
            self._answers.part(attachment.envelope, attachment.header, meta, buffers)

    def _tell_program(self, active: Active, *, held: bool) -> None:
        """Its client must not give up before its deadline, which stands still meanwhile."""
        header = active.header
        if header.deadline_ms:
            progress = messages.Progress("", 0, 0, held)
            frame = codec.encode(
                header.op,
                progress,
                flags=Flag.PROGRESS,
                request=header.request,
                session=header.session,
            )
            self._answers.send(active.envelope, frame)

    def _let_go(self, stop: int) -> None:
        _, active, halt = self._held.pop(stop)
        elapsed_ns = time.perf_counter_ns() - halt.since_ns
        active.held_ns += elapsed_ns
        active.job.watch.add("held", elapsed_ns)
        self._turns.welcome(active.job.session)
        active.halt = None
        self._tell_program(active, held=False)
        self._happened("resume", active, f"let go at layer {active.job.layer}", elapsed_ns)

    def over(self, active: Active) -> None:
        """*active* has ended, held or not."""
        if active.halt is not None:
            self._held.pop(active.halt.number, None)
            active.halt = None

    # ---- ends

    def leave(self, session: EngineSession) -> None:
        """*session* ends: as a debugger, and as what is attached to."""
        for attachment in tuple(self._attachments):
            if attachment.debugger is session:
                self._end(attachment, "the debugger's session was closed")
            elif attachment.target is session:
                self._end(attachment, "its session was closed")

    def let_go(self, session: EngineSession) -> None:
        """The debugger behind *session* is gone."""
        for attachment in tuple(self._attachments):
            if attachment.debugger is session:
                self._end(attachment, "the debugger's connection is gone")

    def _fail(self, attachment: Attachment, error: DjinnError) -> None:
        self._finish(attachment)
        self._answers.refuse(attachment.envelope, attachment.header, error)

    def _end(self, attachment: Attachment, reason: str) -> None:
        """Answered also where nobody is there to hear it: until then the server owes it."""
        self._finish(attachment)
        meta = Detached(attachment.stops, reason)
        self._answers.answer(attachment.envelope, attachment.header, meta)

    def _finish(self, attachment: Attachment) -> None:
        """Whatever it holds goes on."""
        attachment.over = True
        attachment.target.attached = None
        self._attachments.remove(attachment)
        for number in [n for n, held in self._held.items() if held[0] is attachment]:
            self._let_go(number)


def _kind(op: int) -> str:
    return "run" if op == Op.CONTINUE else Op(op).name.lower()


def _info(active: Active) -> RunInfo:
    job = active.job
    state = str(job.state)
    if active.halt is not None:
        state = "held"
    elif active.held is not None:
        state = "waiting"
    return RunInfo(
        request=active.header.request,
        kind=_kind(active.header.op),
        state=state,
        layer=job.layer,
        step=-1 if job.step_now is None else job.step_now,
        batch=job.ids.shape[0],
        positions=job.ids.shape[1],
        age_s=job.watch.elapsed_ns() / 1e9,
        stop=0 if active.halt is None else active.halt.number,
    )
