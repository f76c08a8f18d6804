"""What clients hold of an engine's memory: views of checkpoints, and device slots to write into.

A hold ends when its client lets go, or with the client's session. A slot on the device that a client
has mapped is not used again before the client has let go of it or its process is certainly gone: until
then a kernel of its own might still write there.

    writable   the client's, to change and to send any number of times
    spares     empty ones beside it: into one of them the client copies what it has changed, and gives it
               away with a resume; it becomes the checkpoint's, as it is

A GPU takes 0.2 ms to turn from one process's kernels to another's (H200), a copy from slab to slab
counts as one, and the client's kernels have just run there: so the client makes that copy.
"""

import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from djinn_zmq.engine.device.slabs import DeviceSlot, Spare
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.room import Room
from djinn_zmq.engine.state.tiers import Tiers
from djinn_zmq.errors import AccessDenied, ArenaFull, RequestError
from djinn_zmq.wire.tensors import Device, Tensor

SPARES = 2  # one is told of with the answer that takes the other


@dataclass(slots=True, eq=False)
class Hold:
    """body: what is viewed; or writable: a slot that is the client's to change."""

    session: int
    owner: str
    pidfd: int  # of the client, for a device slot; -1: host memory, which it can only read
    body: Body | None = None
    writable: DeviceSlot | None = None
    spares: list[Spare] = field(default_factory=list)
    zone: str = ""  # of the checkpoints that spares become
    readers: int = 0  # runs that take what a client has written from where it stands

    @property
    def slots(self) -> list[DeviceSlot]:
        """All that the client may write into."""
        mine = [] if self.writable is None else [self.writable]
        return mine + [spare.slot for spare in self.spares]

    @property
    def spare(self) -> Device | None:
        """The one that the client may give away next."""
        return self.spares[0].slot.where if self.spares else None


class Holds:
    def __init__(self, room: Room, tiers: Tiers) -> None:
        self._room = room
        self._tiers = tiers
        self._holds: dict[int, Hold] = {}
        self._lent: dict[Device, Hold] = {}  # by each slot that may be written into

    def __contains__(self, number: int) -> bool:
        return number in self._holds

    def session_of(self, number: int) -> int:
        return self._holds[number].session

    def of(self, session: int) -> list[int]:
        return [number for number, hold in self._holds.items() if hold.session == session]

    def view(self, number: int, session: int, body: Body, pid: int = 0) -> None:
        """A client's view of *body* begins. pid: of a client that maps the device; 0: the host."""
        pidfd = _pidfd(pid) if pid else -1
        body.users += 1
        body.views += 1
        self._holds[number] = Hold(session, body.owner, pidfd, body)

    def lend_copy(self, number: int, session: int, body: Body, pid: int) -> Hold:
        """A slot with the same bytes for a client to write into, and spares for it where there is room.
        Raises ArenaFull."""
        pidfd = _pidfd(pid)
        try:
            slot = self._copy_of(body)
        except BaseException:
            os.close(pidfd)
            raise
        hold = Hold(session, body.owner, pidfd, writable=slot, zone=body.zone)
        self._holds[number] = self._lent[slot.where] = hold
        self.restock(hold)
        return hold

    def _copy_of(self, body: Body) -> DeviceSlot:
        while True:
            try:
                return self._tiers.copy_of(body)
            except ArenaFull:
                if not self._take_back():
                    raise

    def _take_back(self) -> bool:
        """Free a spare that its client was not told of yet. False: there is none."""
        for hold in self._holds.values():
            if len(hold.spares) > 1:
                spare = hold.spares.pop()
                del self._lent[spare.slot.where]
                self._room.slabs.give_back(spare.slot.where)
                self._give_back_lease(spare)
                return True
        return False

    def give_room(self) -> bool:
        """Host memory is wanted for more: free what a spare has of it, which can do without. False: none
        has any."""
        return any(
            self._give_back_lease(spare) for hold in self._holds.values() for spare in hold.spares
        )

    def _give_back_lease(self, spare: Spare) -> bool:
        lease, spare.lease = spare.lease, None
        if lease is not None:
            self._room.pool.give_back(lease.slot)
        return lease is not None

    def restock(self, hold: Hold) -> None:
        """Have SPARES of them again. They lie in the slab of the writable slot, which the client has
        opened; where that is full it has to do without. One that has ended gets none."""
        assert hold.writable is not None
        while len(hold.spares) < SPARES and self._lent.get(hold.writable.where) is hold:
            spare = self._tiers.spare_beside(hold.writable, hold.session, hold.zone)
            if spare is None:
                return
            hold.spares.append(spare)
            self._lent[spare.slot.where] = hold

    def find(self, tensor: Tensor, owner: str) -> torch.Tensor:
        """uint8 (nbytes,): the device slot that *tensor* names. Raises AccessDenied unless it was
        lent to *owner* to write into, and is still."""
        hold = self.lent(tensor, owner)
        return next(one.data for one in hold.slots if one.where == tensor.where)

    def spare_at(self, hold: Hold, where: Device) -> Spare | None:
        """The spare of *hold* at *where*; None where that is the writable slot."""
        return next((spare for spare in hold.spares if spare.slot.where == where), None)

    def take(self, hold: Hold, spare: Spare) -> None:
        """*spare* is nobody's any more, to be taken over."""
        hold.spares.remove(spare)
        del self._lent[spare.slot.where]

    def lent(self, tensor: Tensor, owner: str) -> Hold:
        """The hold of the device slot that *tensor* names. Raises as `find`."""
        where = tensor.where
        assert isinstance(where, Device)
        hold = self._lent.get(where)
        if hold is None or hold.owner != owner:
            raise AccessDenied(
                f"slot {where.index} of slab {where.slab} was not lent to you to write into, or not by "
                "this engine: take another with writable_cuda()"
            )
        assert hold.writable is not None
        if tensor.nbytes != hold.writable.nbytes:
            raise RequestError(
                f"{tensor.nbytes} bytes in a device slot that was lent for {hold.writable.nbytes}"
            )
        return hold

    def reading(self, tensor: Tensor, owner: str) -> Callable[[], None]:
        """A run begins to read the device slot that *tensor* names; call what this returns at its end.
        Raises as `find`."""
        hold = self.lent(tensor, owner)
        hold.readers += 1

        def done() -> None:
            hold.readers -= 1

        return done

    def end(self, number: int, *, gone: bool) -> None:
        """gone: its client did not say that it is done."""
        hold = self._holds.pop(number)
        done = _when_gone(hold.pidfd) if gone and hold.pidfd >= 0 else None
        waits = done is not None and bool(hold.slots)
        for slot in hold.slots:
            del self._lent[slot.where]
            self._room.leaving.free_after(slot, done, lambda: not hold.readers)
        for spare in hold.spares:
            self._give_back_lease(spare)
        hold.spares.clear()
        if hold.body is not None:
            hold.body.views -= 1
            if done is not None and hold.body.device is not None:
                hold.body.mapped.append(done)
                waits = True
            self._room.leave(hold.body)
        if hold.pidfd >= 0 and not waits:  # who waits for the process closes it
            os.close(hold.pidfd)

    def close(self) -> None:
        for hold in self._holds.values():
            if hold.pidfd >= 0:
                os.close(hold.pidfd)
        self._holds.clear()
        self._lent.clear()


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        raise RequestError(
            "device memory is lent only to a process on this machine that shares memory with the "
            f"server: {exc.strerror}"
        ) from exc


def _when_gone(pidfd: int) -> Callable[[], bool]:
    """Is the process of *pidfd* gone, and all it had mapped with it?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    state: Sequence[int] = [pidfd]

    def gone() -> bool:
        nonlocal state
        if state and poll.poll(0):
            os.close(state[0])
            state = ()
        return not state

    return gone
