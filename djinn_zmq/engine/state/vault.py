"""Where the keys and values of stopped conversations are: on the device, or in host memory.

What is moved is a `Segment` (one layer's keys and values of some positions). Segments are immutable, so a
copy in host memory stays good: the next time it is enough to drop the device's. What was not used for
longest goes first, of sessions that said they are away before all; what a job goes on from stays until
its end, and is brought back before its first layer. Copies out and in go on their own streams, both at
once, while the layers of others run.

    ready   host → device   what a job has pinned, and meanwhile others' out: it waits for its room
    shrink  device → host   when more is on the device than may be; after a job a chore

A tensor comes back with the strides that it had: kernels may round otherwise for others.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.models.caches import Segment
from djinn_zmq.engine.state.room import Room
from djinn_zmq.memory.arena import Lease

ALIGNED = 512  # bytes: each tensor in a slot begins at a multiple
BATCH_NBYTES = 256 << 20  # that leave the device before their memory is let go
LEAST_SHARE = 4  # a quarter of the device's budget is theirs, whatever checkpoints take
AHEAD = 2  # times what has to leave now: where some had to, more will
IN_A_TURN = 8  # segments whose copies in are begun before others get their turn


class Moved(NamedTuple):
    session: int
    how: str  # "evict", "prefetch"
    nbytes: int
    elapsed_ns: int


class Layout(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # in the slot
    nbytes: int


@dataclass(slots=True, eq=False)
class Stored:
    """Where a segment is."""

    session: int
    nbytes: int
    used: int  # counted up: the larger, the later
    layouts: dict[Any, Layout]  # by the name of the part
    lease: Lease | None = None  # its copy in host memory
    storing: Callable[[], bool] | None = None  # done? Of a copy there that nobody has waited for
    here: bool = True  # on the device
    pins: int = 0
    moving: bool = False


@dataclass(slots=True)
class Vault:
    device: Device
    room: Room
    limit: int | None  # bytes on the device, with the checkpoints' slabs; None: no limit
    on_device: int = 0
    on_host: int = 0
    _coming: int = 0  # bytes that are being brought
    moves: list[Moved] = field(default_factory=list)  # to be told
    # Of segments that are no more: to be settled.
    gone: deque[Stored] = field(default_factory=deque)
    shrinking: bool = False
    _stored: "weakref.WeakKeyDictionary[Segment, Stored]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _clock: int = 0
    _alive: list[Any] = field(default_factory=list)  # (done?, tensors that a copy writes to)

    # ---- what is known

    def track(self, session: int, segments: Iterable[Segment]) -> None:
        """These exist now, and may be moved when nobody has them pinned."""
        self._clock += 1
        for segment in segments:
            known = self._stored.get(segment)
            if known is not None:
                known.used = self._clock
                continue
            layouts = _layouts(segment)
            if layouts:
                stored = Stored(session, segment.nbytes, self._clock, layouts)
                self._stored[segment] = stored
                self.on_device += stored.nbytes
                # It may run in the middle of anything, and in a thread of the disk's: only noted.
                weakref.finalize(segment, self.gone.append, stored).atexit = False

    def settle(self) -> None:
        """Take note of the segments that are no more: their memory is others' to use."""
        while self.gone:
            stored = self.gone.popleft()
            if stored.here:
                self.on_device -= stored.nbytes
            if stored.lease is not None:
                self._drop_copy(stored)

    def _drop_copy(self, stored: Stored) -> None:
        assert stored.lease is not None
        give_back = partial(self.room.pool.give_back, stored.lease.slot)
        self.room.leaving.free_when(stored.storing, give_back)
        stored.lease = stored.storing = None
        self.on_host -= stored.nbytes

    @property
    def allowance(self) -> int:
        """Bytes of keys and values that may be on the device now."""
        assert self.limit is not None
        return max(self.limit - self.room.slabs.mapped, self.limit // LEAST_SHARE)

    @property
    def crowded(self) -> bool:
        """Is more on the device than may be?"""
        return self.limit is not None and self._excess > 0

    @property
    def pressed(self) -> bool:
        """The same, or memory to be let go of, and nobody sees to it."""
        return not self.shrinking and (self.crowded or self._alive != [])

    @property
    def _excess(self) -> int:
        self.settle()
        return self.on_device + self._coming - self.allowance

    # ---- in

    def pin(self, session: int, segments: Iterable[Segment]) -> list[tuple[Segment, Stored]]:
        """These stay where they are, or come to where they are brought, until `unpin`."""
        segments = list(segments)
        self.track(session, segments)
        known = [(one, self._stored[one]) for one in segments if one in self._stored]
        for _, stored in known:
            stored.pins += 1
        return known

    def unpin(self, known: Iterable[tuple[Segment, Stored]]) -> None:
        for _, stored in known:
            stored.pins -= 1

    def ready(self, known: list[tuple[Segment, Stored]]) -> Iterator[None]:
        """Have what is pinned on the device, and no more there than may be, where others can make
        room: so what is on the device grows no faster than it can leave."""
        coming = sum(stored.nbytes for _, stored in known if not stored.here)
        self._coming += coming  # so that the way out can begin first: it has to wait more often
        bring = self.bring(known)
        ways: list[Generator[None]] = [bring] if self.limit is None else [self.shrink(), bring]
        try:
            while ways:
                for way in tuple(ways):  # both directions at once
                    try:
                        next(way)
                    except StopIteration:
                        ways.remove(way)
                        if way is bring:  # it is on the device now, and counted there
                            self._coming -= coming
                            coming = 0
                if ways:
                    yield
        finally:
            for way in ways:  # an error of one ends the other now, not when it has been forgotten
                way.close()
            self._coming -= coming

    def bring(self, known: list[tuple[Segment, Stored]]) -> Generator[None]:
        """Have what is pinned on the device."""
        while any(stored.moving for _, stored in known):
            yield
        away = [(segment, stored) for segment, stored in known if not stored.here]
        if not away:
            return
        begin_ns = time.perf_counter_ns()
        for _, stored in away:
            stored.moving = True
        made: list[dict[Any, torch.Tensor]] = []
        done = None
        try:
            for place, (_, stored) in enumerate(away):
                made.append(self._fill(stored))
                if place % IN_A_TURN == IN_A_TURN - 1:
                    yield
            done = self.device.filled()
            while not done():
                yield
            for (segment, stored), parts in zip(away, made, strict=True):
                segment.parts, stored.here = parts, True
                self.on_device += stored.nbytes
        finally:
            for _, stored in away:
                stored.moving = False
            if not all(stored.here for _, stored in away):  # a copy may still write into these
                self._alive.append((done or self.device.filled(), made))
        self._tell("prefetch", [stored for _, stored in away], begin_ns)

    def _fill(self, stored: Stored) -> dict[Any, torch.Tensor]:
        assert stored.lease is not None
        data = np.frombuffer(stored.lease.view, np.uint8)
        parts = {}
        for name, layout in stored.layouts.items():
            part = torch.empty_strided(
                layout.shape, layout.stride, dtype=layout.dtype, device=self.device.torch
            )
            self.device.fill_beside(
                data[layout.offset : layout.offset + layout.nbytes], _flat(part)
            )
            parts[name] = part
        return parts

    def back(self, session: int) -> Iterator[None]:
        """*session* is about to go on: have what it holds on the device, the most recently used first
        and no more than may be there: it is only a hint."""
        if self.limit is None:
            return
        mine = [one for one in self._stored.items() if one[1].session == session]
        mine.sort(key=lambda one: -one[1].used)
        sizes = accumulate(stored.nbytes for _, stored in mine)
        fitting = [
            one for (one, _), nbytes in zip(mine, sizes, strict=True) if nbytes <= self.allowance
        ]
        known = self.pin(session, fitting)
        try:
            yield from self.ready(known)
        finally:
            self.unpin(known)

    # ---- out

    def shrink(self) -> Generator[None]:
        """Move what was not used for longest to host memory, until no more is here than may be, or
        nothing more can go; and let go of what copies that were given up have written to."""
        while self.shrinking:
            yield
        self.shrinking = True
        try:
            while self._excess > 0:
                self.room.growing.expect(AHEAD * self._excess)
                batch = self._oldest(self._excess)
                if not batch or not (yield from self._move_out(batch)):
                    break
            while self._let_go():
                yield
        finally:
            self.shrinking = False

    def _oldest(self, excess: int) -> list[tuple[Segment, Stored]]:
        idle = [
            (segment, stored)
            for segment, stored in self._stored.items()
            if stored.here and not stored.pins and not stored.moving
        ]
        idle.sort(key=lambda one: (not self.room.is_away(one[1].session), one[1].used))
        batch, nbytes = [], 0
        for segment, stored in idle:
            if nbytes >= min(excess, BATCH_NBYTES):
                break
            batch.append((segment, stored))
            nbytes += stored.nbytes
        return batch

    def _move_out(self, batch: list[tuple[Segment, Stored]]) -> Iterator[None]:
        """False where host memory is full, and nothing has left the device."""
        begin_ns = time.perf_counter_ns()
        for _, stored in batch:
            stored.moving = True
        done = None
        try:
            for segment, stored in batch:
                if stored.lease is None:
                    lease = yield from self.room.host_slot(_slot_nbytes(stored), stored.session)
                    if lease is None:
                        break  # host memory is full: it stays
                    self._store(segment, stored, lease)
            done = self.device.stored()  # not copies in: they would be waited for in turns
            while not done():
                yield
        finally:
            done = done or self.device.stored()
            for _, stored in batch:
                stored.moving = False
                if stored.lease is not None:  # given up meanwhile, it may be written to still
                    stored.storing = None if done() else done
        left = [(one, stored) for one, stored in batch if stored.lease and not stored.pins]
        for segment, stored in left:
            # Of the same shape and dtype, and an error for whoever reads it.
            segment.parts = {
                name: torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta")
                for name, one in stored.layouts.items()
            }
            stored.here = False
            self.on_device -= stored.nbytes
        self._tell("evict", [stored for _, stored in left], begin_ns)
        return bool(left) or all(stored.lease for _, stored in batch)  # used meanwhile: then others

    def _store(self, segment: Segment, stored: Stored, lease: Lease) -> None:
        """Begin its copy in *lease*; where that fails it has none."""
        try:
            for name, layout in stored.layouts.items():
                slot = lease.view[layout.offset : layout.offset + layout.nbytes]
                self.device.store(_flat(segment.parts[name]), slot)
        except BaseException:
            give_back = partial(self.room.pool.give_back, lease.slot)
            self.room.leaving.free_when(self.device.stored(), give_back)
            raise
        stored.lease = lease
        self.on_host += stored.nbytes

    def _tell(self, how: str, moved: list[Stored], begin_ns: int) -> None:
        elapsed_ns = time.perf_counter_ns() - begin_ns
        by_session: dict[int, int] = {}
        for stored in moved:
            by_session[stored.session] = by_session.get(stored.session, 0) + stored.nbytes
        self.moves += [Moved(one, how, nbytes, elapsed_ns) for one, nbytes in by_session.items()]

    # ---- ends

    def _let_go(self) -> bool:
        """Of the tensors that copies write to no more. True where others are still written to."""
        self._alive = [one for one in self._alive if not one[0]()]
        return self._alive != []

    def drop_copies(self) -> bool:
        """Host memory is wanted for more: give up the copy that is least likely to be needed, of what
        is on the device as well. False: there is none."""
        if self.gone:
            self.settle()
            return True
        spare = [
            one
            for one in self._stored.values()
            if one.lease and one.here and not one.moving and (one.storing is None or one.storing())
        ]
        if not spare:
            return False
        self._drop_copy(max(spare, key=lambda one: one.used))
        return True

    def close(self) -> None:
        self.gone.clear()
        for stored in self._stored.values():
            stored.lease = None
        self._alive.clear()


def _layouts(segment: Segment) -> dict[Any, Layout]:
    """How its parts lie, and where each goes in a slot; none where one of them cannot be moved."""
    layouts, offset = {}, 0
    for name, part in segment.parts.items():
        if not _is_dense(part):
            return {}
        layouts[name] = Layout(part.shape, part.stride(), part.dtype, offset, part.nbytes)
        offset += -(-part.nbytes // ALIGNED) * ALIGNED
    return layouts if segment.nbytes else {}


def _slot_nbytes(stored: Stored) -> int:
    last = max(stored.layouts.values(), key=lambda one: one.offset)
    return last.offset + last.nbytes


def _is_dense(part: torch.Tensor) -> bool:
    """Do its elements fill one stretch of memory, in whatever order?"""
    expected = 1
    for stride, extent in sorted(zip(part.stride(), part.shape, strict=True)):
        if extent == 1:
            continue
        if stride != expected:
            return False
        expected *= extent
    return bool(part.numel())


def _flat(part: torch.Tensor) -> torch.Tensor:
    """uint8 (nbytes,) over the memory of a dense tensor, in the order it has there."""
    flat = part.as_strided((part.numel(),), (1,), part.storage_offset())
    return flat.view(torch.uint8)
