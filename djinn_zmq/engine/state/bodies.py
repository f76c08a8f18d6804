"""A body: the bytes of a checkpoint, and where copies of them are.

Checkpoints made of the same bytes share a body (a resume that stops where it began copies nothing).
Bodies never change; they are only copied from tier to tier, and copies are dropped.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from djinn_zmq.engine.device.slabs import DeviceSlot
from djinn_zmq.memory.arena import Lease
from djinn_zmq.memory.files import MARK
from djinn_zmq.wire.tensors import File, Tensor, Where
from djinn_zmq.wire.tiers import TIERS

TIERS_OF = {  # by whether each has a copy: a table, since it is asked for with every stop and resume
    there: tuple(itertools.compress(TIERS, there))
    for there in itertools.product((False, True), repeat=len(TIERS))
}


@dataclass(slots=True, eq=False)
class Body:
    dtype: str
    shape: tuple[int, ...]  # (batch, positions, hidden_size); of logits that are kept: theirs
    nbytes: int
    session: int
    owner: str
    zone: str  # whose processes may map it; "": nobody's
    ids: np.ndarray  # int64 (batch, positions)
    facts: dict[str, str]  # what its file says of it
    fixed: bool = False  # logits: they wait for their client in host memory and go nowhere
    device: DeviceSlot | None = None
    host: Lease | None = None
    disk: int = 0  # the number whose file holds it; 0: no file
    scratch: np.ndarray | None = None  # uint8: for those who read it now, where no tier has room
    checkpoints: set[int] = field(default_factory=set)
    users: int = 0  # runs, views and copies under way: it stays where it is
    views: int = 0  # how many of them are clients' views
    moving: bool = False  # being read from or written to the disk
    rising: bool = False  # being copied to the device beside the layers
    unwritable: bool = False  # the disk refused it once
    busy: Callable[[], bool] | None = None  # are the device's copies from and to it done?
    storing: Callable[[], bool] | None = None  # is the one to its host slot?
    arriving: Callable[[], bool] | None = None  # is the one to its device slot?
    # Of each client that had mapped its device slot and did not let go: is it gone?
    mapped: list[Callable[[], bool]] = field(default_factory=list)

    @property
    def tiers(self) -> tuple[str, ...]:
        return TIERS_OF[self.device is not None, self.host is not None, self.disk != 0]

    @property
    def tensor(self) -> Tensor:
        """Where others find it: in shared memory if it is there, else in the file, else here."""
        where: Where
        if self.host is not None:
            where = self.host.slot
        elif self.disk:
            where = File(self.disk, self.facts.get(MARK, ""))
        else:
            assert self.device is not None
            where = self.device.where
        return Tensor(self.dtype, self.shape, where)

    @property
    def stored(self) -> bool:
        """Is its host slot, where it has one, as full as it should be?"""
        if self.storing is not None and self.storing():
            self.storing = None
        return self.storing is None

    @property
    def arrived(self) -> bool:
        """The same of its device slot."""
        if self.arriving is not None and self.arriving():
            self.arriving = None
        return self.arriving is None

    @property
    def resident(self) -> bool:
        """Can layers that are begun now read it?"""
        if self.device is not None or self.scratch is not None:
            return True
        return self.host is not None and self.stored

    @property
    def idle(self) -> bool:
        """May its copies be moved and dropped?"""
        return not (self.users or self.moving or self.fixed) and self.settled

    @property
    def settled(self) -> bool:
        """Is all that the device does with its copies done?"""
        if self.busy is not None and self.busy():
            self.busy = None
        return self.busy is None
