"""Moving checkpoints between tiers, holding them for clients' views, making them of files.

Jobs like runs: what waits for the disk or a copy gives others their turns.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from djinn_zmq.engine.device.slabs import DeviceSlot
from djinn_zmq.engine.jobs.job import EngineSession, Job
from djinn_zmq.engine.jobs.runs import Runner
from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.keeping import NAMES, Entry, Keeping, new_id
from djinn_zmq.errors import BadFile, RequestError, UnknownCheckpoint
from djinn_zmq.memory.arena import GRANULE
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.stops import NOTHING
from djinn_zmq.wire.tensors import Device, Tensor
from djinn_zmq.wire.tiers import (
    TIERS,
    Handle,
    Hold,
    HoldReply,
    Move,
    MoveReply,
    Restore,
    RestoreReply,
)

Buffers = Sequence[bytes | memoryview]


@dataclass(slots=True, eq=False)
class MoveJob(Job):
    entries: list[Entry] = field(default_factory=list)

    def reply(self) -> MoveReply:
        kept = tuple(entry.kept for entry in self.entries)
        return MoveReply(kept, self.watch.with_rest("queue", first=True))


@dataclass(slots=True, eq=False)
class HoldJob(Job):
    pid: int = 0  # to which it is lent
    hold: int = 0
    tensor: Tensor | None = None
    handle: Handle | None = None
    spare: Device | None = None

    def reply(self) -> HoldReply:
        assert self.tensor is not None
        return HoldReply(self.hold, self.tensor, self.handle, self.spare)


@dataclass(slots=True, eq=False)
class RestoreJob(Job):
    def reply(self) -> RestoreReply:
        return RestoreReply(self.kept[0], self.watch.with_rest("queue", first=True))


class Mover:
    def __init__(self, keeping: Keeping, runner: Runner) -> None:
        self._keeping = keeping
        self._runner, self._loans = runner, runner.loans

    # ---- move

    def move(
        self,
        asked: Move,
        buffers: Buffers,
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[MoveJob, Iterator[None]]:
        """Raises UnknownCheckpoint, and RequestError for a tier that is none."""
        allowed = TIERS[1:] if asked.down else (*TIERS[:2], "")
        if asked.tier not in allowed:
            what = "evicted to" if asked.down else "prefetched to"
            raise RequestError(
                f'"{asked.tier}" can be {what} nothing: {" or ".join(filter(None, allowed))}'
            )
        entries = [self._find(number, session) for number in dict.fromkeys(asked.ids)]
        if not entries:
            raise RequestError("no checkpoint to move is named")
        job = MoveJob(session, model, entries[0].ids, 0, NOTHING, shared, watch, entries=entries)
        return job, self._move(job, asked)

    def _move(self, job: MoveJob, asked: Move) -> Iterator[None]:
        job.advance("start")
        tiers = self._keeping.tiers
        tier = asked.tier or ("device" if self._keeping.room.slabs.limit else "host")
        for entry in job.entries:
            begin_ns = time.perf_counter_ns()
            if entry.id not in self._keeping.entries:
                continue
            if asked.down:
                yield from tiers.evict(entry.body, tier)
            else:
                self._keeping.hold(entry)
                try:
                    yield from tiers.bring(entry.body, tier)
                finally:
                    self._keeping.let_go(entry)
            job.watch.add("evict" if asked.down else "prefetch", time.perf_counter_ns() - begin_ns)
        for entry in job.entries:  # whenever it was released: before its turn, in it or behind it
            if entry.id not in self._keeping.entries:
                raise UnknownCheckpoint.numbered(entry.id)
        job.advance("finish")

    def _find(self, number: int, session: EngineSession) -> Entry:
        entry = self._keeping.find(number, session.owner)
        if entry.layer < 0 or entry.session != session.id:
            raise RequestError(f"{number:#x} is not a checkpoint of this session")
        return entry

    # ---- hold

    def hold(
        self,
        asked: Hold,
        buffers: Buffers,
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[HoldJob, Iterator[None]]:
        entry = self._find(asked.checkpoint, session)
        if asked.tier not in ("host", "device") or (asked.copy and asked.tier != "device"):
            raise RequestError(f'"{asked.tier}" cannot be held: "host", or "device"')
        if asked.tier == "device" and not session.asker:
            raise RequestError(
                "device memory is lent only to a client on this machine that shares memory with the "
                "server"
            )
        job = HoldJob(session, model, entry.ids, entry.layer, NOTHING, shared, watch)
        job.pid = session.asker
        self._loans.hold(job, [entry])  # now: it may be released before its turn comes
        return job, self._loans.settling(job, self._hold(job, entry, asked))

    def _hold(self, job: HoldJob, entry: Entry, asked: Hold) -> Iterator[None]:
        job.advance("start")
        body: Body = entry.body
        yield from self._keeping.tiers.bring(body, asked.tier)
        while not body.settled:
            yield
        holds, session, number = self._keeping.holds, job.session, new_id()
        if asked.tier == "host":
            holds.view(number, session.id, body)
            job.tensor = body.tensor
        else:
            if asked.copy:
                hold = holds.lend_copy(number, session.id, body, job.pid)
                assert hold.writable is not None
                slot, job.spare = hold.writable, hold.spare
            else:
                holds.view(number, session.id, body, job.pid)
                assert body.device is not None
                slot = body.device
            job.tensor = Tensor(body.dtype, body.shape, slot.where)
            try:
                job.handle = self._handle(slot)
                yield from self._loans.until_done(job)  # what it shows is complete
            except BaseException:  # its client's giving up meanwhile is one
                holds.end(number, gone=False)
                raise
        job.hold = number
        job.advance("finish")

    def _handle(self, slot: DeviceSlot) -> Handle:
        slab = self._keeping.room.slabs.slabs[slot.where.slab]
        uuid, data = self._keeping.device.export(slab.memory)
        slab.exported = True
        offset = slot.where.index * GRANULE
        return Handle(uuid, data, slab.memory.numel(), offset, os.getpid())

    # ---- restore

    def restore(
        self,
        asked: Restore,
        buffers: Buffers,
        session: EngineSession,
        model: ServedModel,
        watch: Stopwatch,
        *,
        shared: bool,
    ) -> tuple[RestoreJob, Iterator[None]]:
        """Raises BadFile where it does not fit the session's model."""
        with watch.span("decode"):
            ids = self._keeping.ids_sent(asked.ids, buffers, session.owner)
            model.check_ids(ids)
        if not 0 <= asked.layer <= model.info.num_layers:
            raise BadFile(
                f'layer {asked.layer}: "{model.info.name}" has layers 0 to {model.info.num_layers}'
            )
        job = RestoreJob(session, model, ids, asked.layer, NOTHING, shared, watch)
        self._loans.read(job, asked.hidden, ())
        return job, self._loans.settling(job, self._restore(job, asked, buffers))

    def _restore(self, job: RestoreJob, asked: Restore, buffers: Buffers) -> Iterator[None]:
        job.advance("start")
        like = self._runner.recordings.of(job.model, job.ids).embedded
        wanted = NAMES[like.dtype], tuple(like.shape)
        given = asked.hidden.dtype, asked.hidden.shape
        if given != wanted:
            raise BadFile(
                f'hidden is {given[0]} {given[1]}, "{job.model.info.name}" needs {wanted[0]} '
                f"{wanted[1]}"
            )
        yield from self._keeping.make_room(asked.hidden.nbytes, job.session.owner)
        with job.watch.span("copy"):
            hidden = self._keeping.load_sent(asked.hidden, buffers, job.session.owner)
            job.kept.append(self._loans.keep(job, hidden, job.layer))
        yield from self._loans.until_done(job)
        job.advance("finish")
