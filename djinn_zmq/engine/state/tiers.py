"""The tiers: device, host, disk. How checkpoints get their copies there, and how they move.

    device   slabs of the device's own memory     a resume copies nothing
    host     arenas shared with server and client a copy of every checkpoint, written through
    disk     files under the state directory      outlive the server

Whatever waits (for the disk, or for the device's copies) is a generator that yields meanwhile, so that
others get their turns.
"""

import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.device.slabs import COPIES, DeviceSlot, Spare
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.room import Room
from djinn_zmq.engine.state.storing import Storing
from djinn_zmq.engine.state.writing import Moved
from djinn_zmq.errors import ArenaFull, BadFile, RequestError
from djinn_zmq.memory.arena import Lease
from djinn_zmq.memory.files import MARK


class Tiers:
    def __init__(self, device: Device, room: Room, moved: Moved) -> None:
        self._device = device
        self._room = room
        self._moved = moved
        self.storing = Storing(device, room.pool)

    # ---- in

    def place(self, body: Body, data: torch.Tensor | np.ndarray) -> None:
        """Give *body* its bytes: a device copy where that tier has room, and a host copy, written
        through. Raises ArenaFull where neither has any; then, and after another error, nothing has changed.

        data: on the device, or uint8 (nbytes,) in host memory.
        """
        lease: Lease | None = None
        slot = None if body.fixed else self._room.device_slot(body.nbytes, body.zone)
        try:
            if slot is not None:  # somebody waits for this copy: it is begun before all else
                body.device = slot
                if isinstance(data, np.ndarray):
                    self._device.fill(data, slot)
                else:
                    self._device.copy(data, slot)
                data = slot.data
            lease, full = self._room.host_slot_of(body)
            if lease is None and slot is None:
                full = full or self._room.pool.full(body.nbytes, body.zone)
                raise self._room.all_full(full, body)
            if isinstance(data, np.ndarray):
                data = self._device.see(data, body.shape, getattr(torch, body.dtype))
            elif slot is None and not (body.fixed or self._device.reads_host):
                # The copy to host memory goes on behind the answer, and behind the layers that follow: a
                # client may write into its slot by then, and some layers write into what they are given.
                data = data.clone()
            if lease is None:
                body.busy = self._device.computed()
            else:
                self.storing.begin(body, data, lease)
        except BaseException:  # no memory for a copy on the way, say
            if slot is not None:
                self._room.leaving.free_when(
                    self._device.computed(), partial(self._room.slabs.give_back, slot.where)
                )
            if lease is not None:
                self._room.leaving.free_when(
                    self._device.stored(), partial(self._room.pool.give_back, lease.slot)
                )
            raise
        self._room.add(body)
        self._room.growing.tend(body.zone)

    def take_over(self, body: Body, spare: Spare) -> None:
        """*spare* holds *body*'s bytes already, and is its device copy from now on. The copy to host
        memory is begun by `fill`: it need not be before an answer."""
        body.device = spare.slot
        lease = spare.lease or self._room.host_slot_of(body)[0]
        if lease is not None:
            self.storing.promise(body, lease)
        self._room.add(body)
        self._room.growing.tend(body.zone)

    def fill(self) -> None:
        """Go on with copies to host slots."""
        if self.storing.settle():
            self._room.leaving.settle()

    def stored(self, body: Body) -> Iterator[None]:
        """Wait until the host slot of *body*, where it has one, can be read."""
        self.fill()
        while not body.stored:
            yield
        self.fill()

    # ---- out

    def hidden(self, body: Body) -> torch.Tensor:
        """The bytes of *body* as a tensor on the device, to be read only, while `users` counts the
        reader. *body* must be resident (`bring`)."""
        dtype = getattr(torch, body.dtype)
        if body.host is not None:
            self.promote(body)
        if body.device is not None:
            return body.device.data.view(dtype).reshape(body.shape)
        data = body.scratch if body.host is None else np.frombuffer(body.host.view, np.uint8)
        assert data is not None
        return self._device.see(data, body.shape, dtype)

    def promote(self, body: Body) -> None:
        """A device copy for a body in host memory that is about to be used, where there is room for one."""
        if body.device is not None or body.rising:
            return
        slot = self._room.device_slot(body.nbytes, body.zone)
        if slot is None:
            return
        begin_ns = time.perf_counter_ns()
        assert body.host is not None
        self._device.fill(np.frombuffer(body.host.view, np.uint8), slot)
        body.device = slot
        body.busy = body.arriving = self._device.computed()
        self._moved(body, "prefetch", time.perf_counter_ns() - begin_ns)

    def bring(self, body: Body, tier: str = "") -> Iterator[None]:
        """Have a copy in *tier* ("device" or "host"; by default anywhere the device can read it).

        The caller counts as a user. Raises ArenaFull where *tier* has no room, BadFile where the
        file is gone or damaged.
        """
        if body.device is None or tier == "host":
            yield from self._to_host(body, must=bool(tier))
        while tier == "device" and body.device is None:
            yield from self._to_device(body)

    def _to_host(self, body: Body, *, must: bool) -> Iterator[None]:
        """must: else it may also come to a scratch place, to be read by those who use it now."""
        while body.host is None and (must or body.scratch is None):
            if body.moving:  # somebody else is bringing it
                self._room.settle()
                yield
                continue
            yield from self._room.make(body.nbytes, body.zone)
            if body.host is None and not body.moving:  # nobody else came first meanwhile
                yield from self._copy_to_host(body, must=must)
        yield from self.stored(body)

    def _copy_to_host(self, body: Body, *, must: bool) -> Iterator[None]:
        begin_ns = time.perf_counter_ns()
        lease, full = self._room.host_slot_of(body)
        if body.device is not None:
            if lease is None:
                raise full or self._room.pool.full(body.nbytes, body.zone)
            self.storing.begin(body, body.device.data, lease)
            yield from self.stored(body)
        elif lease is not None:
            yield from self._read(body, lease.view, lease)
            body.host = lease
        elif must:
            raise full or self._room.pool.full(body.nbytes, body.zone)
        else:
            scratch = np.empty(body.nbytes, np.uint8)
            yield from self._read(body, memoryview(scratch), None)
            body.scratch = scratch
            return
        self._moved(body, "prefetch", time.perf_counter_ns() - begin_ns)

    def _read(self, body: Body, target: memoryview, lease: Lease | None) -> Iterator[None]:
        """Its file into *target*, which is *lease*'s where there is one."""
        body.moving = True
        whole = False
        try:
            while not whole:
                number = body.disk
                future = self._room.disk.load(number, target, body.facts.get(MARK, ""))
                while not future.done():
                    yield
                if (error := future.exception()) is not None and body.disk == number:
                    raise error  # else that number was released meanwhile: the file has another
                whole = error is None
        finally:
            body.moving = False
            if lease is not None and not whole:  # free when the thread is through
                self._room.leaving.free_when(
                    future.done, partial(self._room.pool.give_back, lease.slot)
                )

    def _to_device(self, body: Body) -> Iterator[None]:
        if not self._room.slabs.limit:
            raise RequestError("this engine has no device tier: serve with --gpu-memory")
        if body.rising:  # somebody else is at it
            yield
            return
        slot = self._room.device_slot(body.nbytes, body.zone)
        if slot is None:
            raise self._room.slabs.full(body.nbytes)
        begin_ns = time.perf_counter_ns()
        assert body.host is not None
        self._device.fill_beside(np.frombuffer(body.host.view, np.uint8), slot.data)
        done = self._device.filled()
        body.busy, body.rising = done, True
        try:
            while not done():
                yield
            body.device = slot  # only now: layers are not ordered behind copies beside them
        finally:
            body.rising = False
            if body.device is not slot:
                self._room.leaving.free_when(done, partial(self._room.slabs.give_back, slot.where))
        self._moved(body, "prefetch", time.perf_counter_ns() - begin_ns)

    def evict(self, body: Body, tier: str) -> Iterator[None]:
        """Move *body* down to *tier*, "host" or "disk". Waits while runs use it.

        Raises RequestError where there is no such tier or a view is held, ArenaFull where it has no
        room.
        """
        while not body.idle:
            if body.views:
                raise RequestError("a view of the checkpoint is in use: it stays where it is")
            self._room.settle()
            yield
        if body not in self._room:
            return  # released meanwhile
        body.users += 1  # nobody else moves it meanwhile
        try:
            if body.host is None and (tier == "host" or not body.disk):
                yield from self._to_host(body, must=True)
            if tier == "disk" and not body.disk:
                yield from self._to_disk(body)
            while not body.settled:
                yield
            self.fill()
        finally:
            self._room.leave(body)
        if body not in self._room or body.users:
            return  # released, or in use again: then it gives way later
        if body.device is not None:
            self._room.drop_device(body)
        if tier == "disk" and body.host is not None:
            self._room.drop_host(body)

    def file(self, body: Body) -> Iterator[None]:
        """Give *body* a file, if it has none, beside its other copies and whoever uses them. Raises ArenaFull."""
        while body.moving:
            self._room.settle()
            yield
        if body not in self._room:
            return  # released meanwhile
        body.users += 1
        try:
            if body.host is None and not body.disk:
                yield from self._to_host(body, must=True)
            if not body.disk:
                yield from self._to_disk(body)
        finally:
            self._room.leave(body)

    def _to_disk(self, body: Body) -> Iterator[None]:
        while not body.settled:
            yield
        if not self._room.disk.limit:
            raise RequestError("this server has no disk tier: serve with --state DIR")
        if not self._room.disk.fits(body.nbytes):
            raise self._room.disk.full(body.nbytes)
        if not body.checkpoints:
            return  # released meanwhile: there is no number that a file could have
        self._room.writing.begin(body)
        while body.moving:
            self._room.settle()
            yield
        if not body.disk:
            raise ArenaFull(f"the file could not be written: {self._room.disk.trouble}")

    # ---- copies for clients to write into

    def copy_of(self, body: Body) -> DeviceSlot:
        """A device slot of its own with the same bytes, in a slab that holds nothing but such copies:
        a client that writes beside or after its time harms no checkpoint. Raises ArenaFull."""
        if not self._room.slabs.limit:
            raise RequestError("this engine has no device tier: serve with --gpu-memory")
        self._room.settle()
        slot = self._room.device_slot(body.nbytes, body.zone + COPIES)
        if slot is None:
            raise self._room.slabs.full(body.nbytes)
        self._device.copy(self.hidden(body), slot)
        return slot

    def spare_beside(self, slot: DeviceSlot, session: int, zone: str) -> Spare | None:
        """One more like *slot*, in its slab; None where that has no room. Nothing gives way for it."""
        if self._room.leaving:
            self._room.leaving.settle()
        beside = self._room.slabs.lease_beside(slot.where, slot.nbytes)
        if beside is None:
            return None
        ready = self._room.pool.ready(slot.nbytes, zone)
        return Spare(
            beside, self._room.pool.lease(slot.nbytes, session, zone=zone) if ready else None
        )

    # ---- sessions

    def back(self, session: int) -> Iterator[None]:
        """*session* is about to come back: bring up what it has, the most recently used first."""
        for body in reversed(self._room.of(session)):
            if body not in self._room:
                continue
            body.users += 1
            try:
                yield from self.bring(body, "device" if self._room.slabs.limit else "host")
            except (ArenaFull, BadFile):
                return  # it is only a hint; a resume will say what is wrong
            finally:
                self._room.leave(body)

    def close(self) -> None:
        self.storing.clear()
