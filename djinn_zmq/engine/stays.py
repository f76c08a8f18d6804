"""Resumes that stop where they begin: "is layer N+1 ready to run?"

There is no layer to take turns for, so they are no jobs: the checkpoint is there already, or a copy is begun
and the answer waits for it, beside all else.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.jobs.runs import check_hidden
from djinn_zmq.engine.state.holds import Hold
from djinn_zmq.engine.state.keeping import Entry, Keeping, new_id
from djinn_zmq.engine.telling import Telling
from djinn_zmq.errors import DjinnError, RunError
from djinn_zmq.wire import states
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Drop, Kept, Resume, RunReply
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Device, Tensor

LOGITS = ("last", "all", "none")  # it has none in any case; "top" says how many, to be checked
STOPPED = str(states.Run.STOPPED)
# Ahead of a copy's end, when whoever waits for it is rung: in that time it wakes up.
WAKE_NS = 60_000


@dataclass(slots=True, eq=False)
class _Stay:
    """kept: what it comes to, once *done* says that it is there; None: it is. hold: of the device slot
    that was sent. copied_ns: when its copy was begun, where one is. rung: whoever waits for it has been
    woken."""

    session: EngineSession
    envelope: bytes
    header: Header
    begin_ns: int
    entry: Entry
    kept: Kept
    run: int
    done: Callable[[], bool] | None
    hold: Hold | None
    copied_ns: int
    sent: Tensor | None  # what was copied; None: nothing was sent, or it was taken over
    rung: bool = False


class Stays:
    def __init__(
        self,
        keeping: Keeping,
        answers: Answers,
        telling: Telling,
        failed: Callable[[Exception], None],
    ) -> None:
        """failed: raises where the device is of no use any more after an error of its."""
        self._keeping = keeping
        self._answers = answers
        self._telling = telling
        self._failed = failed
        self._waiting: list[_Stay] = []
        self._ns_a_byte = 0.0  # of the last copy that was waited for

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(
        self,
        asked: Resume,
        buffers: Sequence[bytes | memoryview],
        session: EngineSession,
        envelope: bytes,
        header: Header,
        begin_ns: int,
    ) -> bool:
        """Take a request that is such a resume. False for any other, right or wrong, and for what has
        to wait for room or the disk: those are jobs.

        Raises EditError, AccessDenied.
        """
        for one in self._waiting:
            if one.session is session and one.header.request == header.request:
                one.envelope = envelope  # asked again meanwhile: answer the newer asker
                return True
        keeping, wanted = self._keeping, asked.wanted
        entry = keeping.entries.get(asked.checkpoint)
        if (
            entry is None
            or entry.session != session.id
            or entry.layer != wanted.stop_at
            or asked.edits
            or wanted.save_at
            or wanted.logits not in LOGITS
            or entry.place
            or entry.past
            or entry.midway is not None
            or session.attached is not None
        ):
            return False
        run, done, hold, copied_ns, copied = new_id(), None, None, 0, None
        if asked.hidden is not None:
            check_hidden(asked.hidden, entry.body.tensor)
            sent, spare = asked.hidden, None
            if isinstance(sent.where, Device):
                hold = keeping.holds.lent(sent, session.owner)
                spare = keeping.holds.spare_at(hold, sent.where)
            own = spare is not None and spare.lease is not None  # a host slot: it needs no other
            if not own and not keeping.fits(entry.body.nbytes, session.owner):
                return False
            if hold is not None and spare is not None:
                keeping.holds.take(hold, spare)
                self._answers.soon(envelope)
                kept = keeping.take_over(spare, entry, run)
            else:
                copied_ns = time.perf_counter_ns()
                kept, copied = keeping.keep_sent(sent, buffers, entry, run), sent
                done = keeping.device.computed()
        elif keeping.ready(entry):
            self._answers.soon(envelope)
            kept = keeping.share(entry, run)
        else:
            copied_ns = time.perf_counter_ns()
            if not keeping.promote(entry):
                return False
            kept, done = keeping.share(entry, run), entry.body.arriving
        self._telling.kept(entry.ids, (kept,), session)  # while it comes: it is not waited for
        stay = _Stay(
            session, envelope, header, begin_ns, entry, kept, run, done, hold, copied_ns, copied
        )
        if not self._answered(stay):
            self._waiting.append(stay)
        return True

    def answer(self) -> None:
        """Answer those that are there by now."""
        for stay in tuple(self._waiting):
            if self._answered(stay):
                self._waiting.remove(stay)

    def _answered(self, stay: _Stay) -> bool:
        try:
            if stay.done is not None and not self._is_there(stay, stay.done):
                return False
            if stay.sent is not None:
                self._keeping.check_sent(stay.sent)
        except DjinnError as exc:
            self._refuse(stay, exc)
            return True
        except Exception as exc:  # noqa: BLE001  the device's
            self._failed(exc)
            self._refuse(stay, RunError(f"{type(exc).__name__}: {exc}"))
            return True
        kept = (stay.kept,)
        spans = (("restore", time.perf_counter_ns() - stay.begin_ns),)
        layer, hold, spare = stay.entry.layer, stay.hold, None
        if hold is not None:
            if not hold.spares:
                self._keeping.holds.restock(hold)
            spare = hold.spare
        reply = RunReply(
            stay.run, STOPPED, layer, None, kept, None, 0, None, None, None, spans, 0, spare
        )
        self._answers.answer(stay.envelope, stay.header, reply, store=True)
        if hold is not None:
            self._keeping.holds.restock(hold)
        return True

    def _is_there(self, stay: _Stay, done: Callable[[], bool]) -> bool:
        """Has its copy been made? Whoever waits for it is woken a little before that: when it has taken
        nearly as long as the last one."""
        nbytes, taken_ns = stay.entry.body.nbytes, time.perf_counter_ns() - stay.copied_ns
        there = done()
        if not stay.rung and (there or taken_ns > self._ns_a_byte * nbytes - WAKE_NS):
            stay.rung = True
            self._answers.soon(stay.envelope)
            if not there:
                self._answers.rehearse()  # so that what makes its own is not cold
        if there:
            self._ns_a_byte = taken_ns / max(1, nbytes)
        return there

    def end(self, session: int, error: DjinnError) -> None:
        """Those of *session* are over."""
        for stay in [one for one in self._waiting if one.session.id == session]:
            self._waiting.remove(stay)
            self._refuse(stay, error)

    def _refuse(self, stay: _Stay, error: DjinnError) -> None:
        """It comes to nothing: nobody will ever refer to what it was to be."""
        self._keeping.drop((stay.kept.id,))
        self._answers.tell(Op.DROP, Drop((stay.kept.id,)), stay.session.id)
        self._answers.refuse(stay.envelope, stay.header, error)
