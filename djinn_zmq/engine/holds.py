"""What clients hold of an engine's memory: views of checkpoints, and device slots to write into.

A hold ends when its client lets go, or with the client's session. A slot on the device that a client
has mapped is not used again before the client has let go of it or its process is certainly gone: until
then a kernel of its own might still write there.
"""

import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from djinn_zmq.engine.bodies import Body
from djinn_zmq.engine.slabs import DeviceSlot
from djinn_zmq.engine.tiers import Tiers
from djinn_zmq.errors import AccessDenied, RequestError
from djinn_zmq.wire.tensors import Device, Tensor


@dataclass(slots=True, eq=False)
class Hold:
    """body: what is viewed; or copy: a slot that is the client's to change."""

    session: int
    owner: str
    pidfd: int  # of the client, for a device slot; -1: host memory, which it can only read
    body: Body | None = None
    copy: DeviceSlot | None = None
    nbytes: int = 0


class Holds:
    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._holds: dict[int, Hold] = {}

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

    def lend_copy(self, number: int, session: int, body: Body, pid: int) -> DeviceSlot:
        """A slot with the same bytes for a client to write into. Raises ArenaFull."""
        pidfd = _pidfd(pid)
        try:
            slot = self._tiers.copy_of(body)
        except BaseException:
            os.close(pidfd)
            raise
        self._holds[number] = Hold(session, body.owner, pidfd, None, slot, body.nbytes)
        return slot

    def find(self, tensor: Tensor, owner: str) -> torch.Tensor:
        """uint8 (nbytes,): the device slot that *tensor* names. Raises AccessDenied unless it was
        lent to *owner* to write into, and is still."""
        where = tensor.where
        assert isinstance(where, Device)
        for hold in self._holds.values():
            if hold.copy is not None and hold.copy.where == where and hold.owner == owner:
                if tensor.nbytes != hold.nbytes:
                    raise RequestError(
                        f"{tensor.nbytes} bytes in a device slot that was lent for {hold.nbytes}"
                    )
                return hold.copy.data
        raise AccessDenied(
            f"slot {where.index} of slab {where.slab} was not lent to you to write into, or not by "
            "this engine: take another with writable_cuda()"
        )

    def end(self, number: int, *, gone: bool) -> None:
        """gone: its client did not say that it is done."""
        hold = self._holds.pop(number)
        done = _when_gone(hold.pidfd) if gone and hold.pidfd >= 0 else None
        if hold.pidfd >= 0 and done is None:
            os.close(hold.pidfd)
        if hold.copy is not None:
            self._tiers.give_back_when(done or (lambda: True), hold.copy)
        if hold.body is not None:
            hold.body.views -= 1
            if done is not None and hold.body.device is not None:
                self._tiers.quarantine(hold.body, done)
            self._tiers.leave(hold.body)

    def close(self) -> None:
        for hold in self._holds.values():
            if hold.pidfd >= 0:
                os.close(hold.pidfd)
        self._holds.clear()


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
