"""Room for checkpoints: in the device's slabs, in the arenas of host memory, in files; what gives way to what.

What was not used for longest gives way first; what belongs to a session that said it is away, before
all else. A device copy is dropped where another copy is there. A host copy is dropped where a file
is there, and is written to one first where not; without a disk tier a device copy must do. What a run
or a view is using stays. Where nothing more gives way the newcomer is refused, with sizes.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from functools import partial

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.device.slabs import DeviceSlot, Slabs
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.disk import Disk
from djinn_zmq.engine.state.growing import Grow, Growing
from djinn_zmq.engine.state.leaving import Leaving
from djinn_zmq.engine.state.writing import Moved, Writing
from djinn_zmq.errors import ArenaFull
from djinn_zmq.memory.arena import Lease, Pool
from djinn_zmq.settings import format_bytes

WRITE_BEHIND_FROM = 0.75  # of the host tier's limit: from here on the oldest get files in advance


class Room:
    def __init__(
        self,
        device: Device,
        slabs: Slabs,
        pool: Pool,
        disk: Disk,
        moved: Moved,
        grow: Grow,
    ) -> None:
        self.slabs = slabs
        self.pool = pool
        self.disk = disk
        self._moved = moved
        self.growing = Growing(pool, grow)
        self._bodies: OrderedDict[Body, None] = OrderedDict()  # the least recently used first
        self._away: dict[int, float] = {}  # session → monotonic: until when it is not expected
        self.more: Callable[[], bool] = lambda: False  # frees some host memory of others'
        self.leaving = Leaving(device, slabs)
        self.writing = Writing(disk, moved)

    @property
    def beside(self) -> bool:
        """Is a thread at work for us?"""
        return bool(self.growing) or self.disk.busy

    # ---- who takes part

    def __contains__(self, body: Body) -> bool:
        return body in self._bodies

    def add(self, body: Body) -> None:
        """*body* has its bytes: it takes part from now on, as the one used last."""
        self._bodies[body] = None

    def touch(self, body: Body) -> None:
        self._bodies.move_to_end(body)

    def recent(self) -> Iterator[Body]:
        """All of them, the most recently used first."""
        return reversed(self._bodies)

    # ---- room

    def make(self, nbytes: int, zone: str) -> Iterator[None]:
        """Wait until a host slot of *nbytes* can be had, or no more can be done for it.

        One more arena is made beside us: its pages, and registering them, take tens of milliseconds.
        """
        self.settle()
        while nbytes <= self.pool.limit and not self.pool.ready(nbytes, zone):
            if self.growing or self.growing.begin(nbytes, zone):
                yield
                self.settle()
                continue
            if self._drop_one() or self.more():
                continue
            if not self.writing and not self._write_one() and not self.leaving.soon:
                return
            yield
            self.settle()

    def host_slot(self, nbytes: int, session: int) -> Generator[None, None, Lease | None]:
        """A slot for what is not a checkpoint and nobody maps; None where nothing makes room."""
        yield from self.make(nbytes, "")
        try:
            return self.pool.lease(nbytes, session)
        except ArenaFull:
            return None

    def host_slot_of(self, body: Body) -> tuple[Lease | None, ArenaFull | None]:
        """A slot for *body*, at once, whatever gives way for it; or None, and what is full."""
        while True:
            try:
                return self.pool.lease(body.nbytes, body.session, zone=body.zone), None
            except ArenaFull as exc:
                if body.nbytes > self.pool.limit:  # nothing that gives way is enough
                    return None, exc
                if self.growing:  # they have what the limit leaves: the first is soon there
                    self.growing.wait()
                elif not self._drop_one() and not self.more():
                    return None, exc

    def device_slot(self, nbytes: int, zone: str) -> DeviceSlot | None:
        """The same on the device; None also where it has no tier. What lies where it could not be stays: a
        slab is never freed."""
        if not self.slabs.limit:
            return None
        slot = self.slabs.lease(nbytes, zone)
        if slot is None and self.leaving:
            self.leaving.settle()
            slot = self.slabs.lease(nbytes, zone)
        while slot is None:
            victim = next(
                (
                    one
                    for one in self._oldest()
                    if one.device
                    and len(one.tiers) > 1
                    and self.slabs.may_hold(one.device.slab, nbytes, zone)
                ),
                None,
            )
            if victim is None:
                return None
            self.drop_device(victim)
            slot = self.slabs.lease(nbytes, zone)
        return slot

    def all_full(self, host: ArenaFull, body: Body) -> ArenaFull:
        """*host*, which says what host memory lacks for *body*, with the other tiers that have no room either:
        the device, where it was asked before, and the disk for what would give way."""
        full = {
            "device": 0 if body.fixed else self.slabs.limit,
            "disk": 0 if self.disk.fits(body.nbytes) else self.disk.limit,
        }
        others = [
            f"the {tier} tier (limit {format_bytes(limit)})"
            for tier, limit in full.items()
            if limit
        ]
        return ArenaFull(f"{host}; full as well: {', '.join(others)}") if others else host

    # ---- what gives way

    def _oldest(self) -> Iterator[Body]:
        """Bodies that may be moved, those that are to give way first in front."""
        if self._away:
            now = time.monotonic()
            away = [one for one in self._bodies if self._away.get(one.session, 0.0) > now]
            away.sort(key=lambda one: -self._away[one.session])  # the longest away first
            yield from (one for one in away if one.idle)
        yield from (one for one in self._bodies if one.idle)

    def _drop_one(self) -> bool:
        """Free the host slot of the first body that has another copy. False: there is none."""
        for body in self._oldest():
            if body.host and (body.disk or (body.device and not self.disk.limit)):
                self.drop_host(body)
                return True
        return False

    def drop_host(self, body: Body) -> None:
        """Its copy in host memory; it must have another."""
        begin_ns = time.perf_counter_ns()
        assert body.host is not None
        self.pool.give_back(body.host.slot)
        body.host = None
        self._moved(body, "evict", time.perf_counter_ns() - begin_ns)

    def drop_device(self, body: Body) -> None:
        """The same of its copy on the device."""
        begin_ns = time.perf_counter_ns()
        assert body.device is not None
        self.slabs.give_back(body.device.where)
        body.device = None
        self._moved(body, "evict", time.perf_counter_ns() - begin_ns)

    def _write_one(self) -> bool:
        """Begin to write the first body that has no file yet. False: there is none, or no room."""
        for body in self._oldest():
            if self.writing.wanted(body):
                self.writing.begin(body)
                return True
        return False

    def settle(self) -> None:
        """Take note of what has been done beside us: files written, slots free to be used again,
        an arena made."""
        self.growing.take()
        for body in self.writing.settle():
            self._free_unless_needed(body)
        self.leaving.settle()

    def write_behind(self) -> None:
        """Keep some of the host tier free to be dropped at once, so that runs need not wait."""
        if (
            self.disk.limit
            and not self.writing
            and self.pool.used > WRITE_BEHIND_FROM * self.pool.limit
        ):
            self._write_one()

    # ---- sessions

    def away(self, session: int, expected_s: float) -> None:
        """*session* will not be back for so long: what it has gives way first."""
        self._away[session] = time.monotonic() + expected_s

    def expect(self, session: int) -> None:
        """*session* is about to come back: what it has does not give way first any more."""
        self._away.pop(session, None)

    def of(self, session: int) -> list[Body]:
        """Its checkpoints, the least recently used first."""
        return [one for one in self._bodies if one.session == session and not one.fixed]

    def is_away(self, session: int) -> bool:
        return self._away.get(session, 0.0) > time.monotonic()

    def forget_session(self, session: int) -> None:
        self._away.pop(session, None)

    # ---- ends

    def leave(self, body: Body) -> None:
        """One user less; the last one frees what nobody refers to any more."""
        body.users -= 1
        if not body.users:
            body.scratch = None
        self._free_unless_needed(body)

    def share(self, body: Body, number: int) -> None:
        """Checkpoint *number* is made of the same bytes."""
        body.checkpoints.add(number)
        if body.disk:
            self.disk.link(body.disk, number)

    def release(self, body: Body, number: int) -> None:
        """Checkpoint *number* is no more."""
        body.checkpoints.discard(number)
        if body.disk and (body.checkpoints or len(body.tiers) > 1):
            if number == body.disk:
                body.disk = min(body.checkpoints, default=number)
            self.disk.remove(number, body.disk)
        # Else whoever uses it may still have to read it: the file goes with the body.
        self._free_unless_needed(body)

    def _free_unless_needed(self, body: Body) -> None:
        if body.checkpoints or body.users or body.moving or body not in self._bodies:
            return
        del self._bodies[body]
        if body.disk:
            self.disk.remove(body.disk)
            self.disk.used -= body.nbytes
        if body.host is not None:
            self._when_settled(body, partial(self.pool.give_back, body.host.slot))
        if body.mapped and body.device is not None:
            self.leaving.free_after(body.device, *body.mapped, body.busy)
        elif body.device is not None:
            self._when_settled(body, partial(self.slabs.give_back, body.device.where))

    def _when_settled(self, body: Body, give_back: Callable[[], None]) -> None:
        """Whoever gets the slot next may not be ordered behind the device's copies."""
        self.leaving.free_when(body.busy, give_back)

    def close(self) -> None:
        """Let go of every view of the arenas, so that they can be unmapped."""
        self.growing.close()
        self._bodies.clear()
        self.writing.clear()
        self.leaving.clear()
