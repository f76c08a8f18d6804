"""What a job borrows of what is kept, and what it keeps itself: all of it stays where it is until the
job is over, or until that has been told."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial

import torch

from djinn_zmq.engine.jobs.job import EngineSession, Job, Turns
from djinn_zmq.engine.models.caches import Past, Segment
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.settings import MIB
from djinn_zmq.wire.edits import Edit, tensors_in
from djinn_zmq.wire.tensors import SLOT_FROM, Slot, Tensor
from djinn_zmq.wire.tiers import Kept

FRAME_LIMIT = 1 * MIB  # logits larger than this are read piece by piece, from a slot


class Loans:
    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping

    # ---- what a job reads

    def hold(self, job: Job, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._keeping.hold(entry)
            job.loans.append(entry)

    def lend(self, job: Job, entry: Entry) -> Generator[None, None, torch.Tensor]:
        """The hidden state of *entry* on the device, for *job* to read and not to change.

        It stays there until the job ends. Raises ArenaFull where there is no room to bring it to.
        """
        if entry not in job.loans:
            self.hold(job, [entry])
        if not self._keeping.resident(entry):
            begin_ns = time.perf_counter_ns()
            yield from self._keeping.bring(entry)
            job.watch.add("prefetch", time.perf_counter_ns() - begin_ns)
        with job.watch.span("restore"):
            return self._keeping.hidden(entry)

    def pin(self, job: Job, past: Past, below: Sequence[Segment]) -> Iterator[None]:
        """Have the keys and values that *job* goes on from on the device, until it ends."""
        vault = self._keeping.vault
        segments = [segment for node in past.chain() for segment in node.segments]
        pins = vault.pin(job.session.id, [*segments, *below])
        job.ends.append(partial(vault.unpin, pins))
        here = all(stored.here for _, stored in pins)
        if not here or vault.crowded:
            begin_ns = time.perf_counter_ns()
            yield from vault.ready(pins)
            what = "evict" if here else "prefetch"
            job.watch.add(what, time.perf_counter_ns() - begin_ns)

    def read(self, job: Job, hidden: Tensor | None, edits: tuple[Edit, ...]) -> None:
        """*job* reads what its client sent: what is in a slot must stay there until it is done (`until_done`)."""
        sent = tensors_in(edits) if hidden is None else (hidden, *tensors_in(edits))
        job.sent = tuple(one for one in sent if isinstance(one.where, Slot))

    # ---- what it makes

    def keep(
        self, job: Job, data: torch.Tensor, layer: int, *, place: str = "", base: int = 0
    ) -> Kept:
        """Keep *data* for the job's session. layer: -1 where it is no checkpoint. place, base: as
        in `Kept`."""
        return self.lent(job, self.keep_for(job.session, job, data, layer, place=place, base=base))

    def keep_for(
        self,
        session: EngineSession,
        job: Job,
        data: torch.Tensor,
        layer: int,
        *,
        place: str = "",
        base: int = 0,
    ) -> Kept:
        """The same for *session*, a debugger's say, which alone decides how long."""
        return self._keeping.keep(
            data,
            session=session.id,
            owner=session.owner,
            run=job.id,
            layer=layer,
            ids=job.ids,
            midway=job.midway(layer),
            place=place,
            base=base,
            facts=job.model.facts,
        )

    def lent(self, job: Job, kept: Kept) -> Kept:
        """What a job has made stays where it is until that has been told."""
        entry = self._keeping.entries[kept.id]
        self._keeping.hold(entry)
        job.loans.append(entry)
        return kept

    def too_large(self, job: Job, data: torch.Tensor) -> bool:
        """Must *data* be kept in a slot, because it does not travel with the reply?"""
        return data.nbytes > (SLOT_FROM if job.shared else FRAME_LIMIT)

    def keep_in_room(
        self, job: Job, data: torch.Tensor, layer: int, *, place: str = "", base: int = 0
    ) -> Generator[None, None, Kept]:
        """As `keep`, when there is room for it, or nothing more can be done for that."""
        owner = job.session.owner
        if not self._keeping.fits(data.nbytes, owner):
            begin_ns = time.perf_counter_ns()
            yield from self._keeping.make_room(data.nbytes, owner)
            job.watch.add("evict", time.perf_counter_ns() - begin_ns)
        with job.watch.span("copy"):
            return self.keep(job, data, layer, place=place, base=base)

    def keep_large_logits(self, job: Job) -> Iterator[None]:
        if (
            job.logits is not None
            and job.wanted.logits != "top"
            and self.too_large(job, job.logits)
        ):
            job.logits_kept = yield from self.keep_in_room(job, job.logits, -1)

    # ---- its end

    def until_done(self, job: Job) -> Iterator[None]:
        """A GPU works behind our back: give others their turns until it is through.

        Copies to the host are under way still: a checkpoint's slot says so to whoever reads it. What
        the client reads at once is waited for. Raises StaleSlot where what the client sent has not stayed until now.
        """
        done = self._keeping.device.computed()
        begin_ns = time.perf_counter_ns()
        while not done():
            yield
        for entry in tuple(job.loans):
            if entry.body.fixed:
                yield from self._keeping.tiers.stored(entry.body)
        for tensor in job.sent:
            self._keeping.check_sent(tensor)
        job.watch.add("compute", time.perf_counter_ns() - begin_ns)

    def settling(self, job: Job, turns: Turns) -> Turns:
        """*turns*, and `over` when they end, however that is."""
        try:
            yield from turns
        finally:
            self.over(job)

    def over(self, job: Job) -> None:
        """The job has ended; may be called again."""
        self.settle(job)
        while job.ends:
            job.ends.pop()()

    def settle(self, job: Job) -> None:
        """What the job has read and made may move again."""
        for entry in job.loans:
            self._keeping.let_go(entry)
        job.loans.clear()

    def discard(self, job: Job) -> None:
        """The job came to nothing: give back what it kept."""
        self._keeping.drop([kept.id for kept in job.everything_kept])
        for kept in job.everything_kept:
            job.session.branches.pop(kept.id, None)
        job.kept.clear()
        job.logits_kept = None
        self.settle(job)
