"""What an engine works on between two looks at its inputs: a layer of one run, a step of each chore.

What a run comes to is answered here; how it is begun is `loop`'s to know, what its layers do `jobs.runs`'.
"""

import logging
import time
from collections.abc import Iterator

from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.debugging import Debugging
from djinn_zmq.engine.device.devices import Broken, Device
from djinn_zmq.engine.jobs import replies
from djinn_zmq.engine.jobs.job import Halt, Part
from djinn_zmq.engine.jobs.loans import Loans
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.engine.telling import Telling
from djinn_zmq.engine.turns import Active, Turns
from djinn_zmq.errors import DeadlineExceeded, DjinnError, RunError

_log = logging.getLogger(__name__)


class Work:
    def __init__(
        self,
        turns: Turns,
        keeping: Keeping,
        loans: Loans,
        answers: Answers,
        telling: Telling,
        debugging: Debugging,
        device: Device,
    ) -> None:
        self.chores: list[Iterator[None]] = []  # what nobody waits for
        self._turns = turns
        self._keeping = keeping
        self._loans = loans
        self._answers = answers
        self._telling = telling
        self._debugging = debugging
        self._device = device

    def step(self) -> None:
        if self._turns:
            self._work(self._turns.next())
        if self.chores:
            for chore in tuple(self.chores):  # copies, both directions at once
                self._chore(chore)

    def _chore(self, chore: Iterator[None]) -> None:
        """One step of what nobody waits for."""
        try:
            next(chore)
        except StopIteration:
            self.chores.remove(chore)
        except Exception as exc:  # noqa: BLE001  nobody is to be answered
            self.end_if_broken(exc)
            _log.exception("moving checkpoints that nobody waits for failed")
            self.chores.remove(chore)

    def _work(self, active: Active) -> None:
        """One layer of one run, and what follows where it was the last."""
        if active.left_s < 0:
            limit_ms = active.header.deadline_ms
            self.end(active, DeadlineExceeded(f"not done within {limit_ms} ms"))
            return
        begin_ns = time.perf_counter_ns()
        try:
            active.held = next(active.turns)
        except StopIteration:
            self._finish(active)
            self._over(active)
        except DjinnError as exc:
            self._fail(active, exc)
            self._over(active)
        except Exception as exc:  # noqa: BLE001  the model's own code, or out of memory
            self.end_if_broken(exc)
            _log.exception("a run of %s failed", active.job.model.info.name)
            self._fail(active, RunError(f"{type(exc).__name__}: {exc}"))
            self._over(active)
        else:
            if type(active.held) is Halt:
                self._debugging.hold(active)
            elif active.held is not None:
                self.hand_out(active)
        self._turns.worked(active, time.perf_counter_ns() - begin_ns)

    def end_if_broken(self, error: Exception) -> None:
        """Raises Broken where *error* means that nothing can be done in this process any more."""
        if reason := self._device.broken(error):
            raise Broken(reason) from error

    def hand_out(self, active: Active) -> None:
        """Send the part that *active* has made, if its client takes one more."""
        part = active.held
        if not isinstance(part, Part) or active.credit <= 0:
            return
        active.held = None
        active.credit -= 1
        header = active.header
        job = active.job
        self._telling.kept(job.ids, getattr(part.meta, "checkpoints", ()), job.session)
        self._answers.part(active.envelope, header, part.meta, part.buffers)
        job.kept = []  # it is the client's from now on, whatever becomes of the job

    def _finish(self, active: Active) -> None:
        job, header = active.job, active.header
        try:
            meta, buffers = replies.of(job)
        except Exception as exc:  # noqa: BLE001  out of memory, mostly; this run's end, not ours
            self.end_if_broken(exc)
            _log.exception("the answer of a run of %s failed", job.model.info.name)
            self._loans.discard(job)
            self._answers.refuse(active.envelope, header, RunError(f"{type(exc).__name__}: {exc}"))
            return
        self._telling.kept(job.ids, job.everything_kept, job.session)
        self._telling.held(job.session)
        self._answers.answer(active.envelope, header, meta, buffers, store=True)
        if self._debugging.tells:
            self._debugging.ended(active)

    def _fail(self, active: Active, error: DjinnError) -> None:
        if active.job.state not in ("finished", "stopped"):
            active.job.advance("fail")
        self._loans.discard(active.job)
        self._answers.refuse(active.envelope, active.header, error)

    def end(self, active: Active, error: DjinnError) -> None:
        """Stop an active run at the layer it has come to."""
        try:
            active.turns.close()  # type: ignore[attr-defined]
        except Exception as exc:  # noqa: BLE001  what its layers put right, say: it is ended all the same
            self.end_if_broken(exc)
            _log.exception("ending a run of %s failed", active.job.model.info.name)
        active.job.advance("cancel")
        self._loans.discard(active.job)
        self._answers.refuse(active.envelope, active.header, error)
        self._over(active)

    def _over(self, active: Active) -> None:
        self._turns.remove(active)
        self._debugging.over(active)
        self._loans.over(active.job)
        if self._keeping.vault.pressed:
            self.chores.append(self._keeping.vault.shrink())
