"""What an engine keeps, with the server's own arenas at the other end of a real lease socket."""

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.state.keeping import Entry, Keeping
from djinn_zmq.errors import Lost
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.settings import KIB, Settings
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.tensors import Slot

LIMITS = Settings(host_memory=2048 * KIB, arena=512 * KIB)
ENGINE = 3  # its index
OWNER = "me"
IDS = np.arange(10, dtype=np.int64).reshape(2, 5)


class ServerSide:
    """The server's arenas and its ends of engines' lease sockets, answered by a thread."""

    def __init__(self, directory: Path) -> None:
        self.arenas = Arenas(directory / "lease", LIMITS, lambda peer: None, lambda *offer: 0)
        self._ends: dict[int, LeaseSocket] = {}
        self._wake, self._stop = socket.socketpair()
        self._hung_up = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def engine(
        self, device: Cpu | None = None, device_memory: int | None = None, state: Path | None = None
    ) -> Keeping:
        """A fresh engine's Keeping, with a lease socket of its own. state: its disk tier's directory."""
        ours, theirs = lease_bus.pair()
        self._ends[ours.socket.fileno()] = ours
        self._stop.send(b"w")  # look at the new one too
        limits = replace(LIMITS, device_memory=device_memory)
        if state is not None:
            limits = replace(limits, state=str(state), disk=4096 * KIB)
        return Keeping(limits, LeaseSocket(theirs), ENGINE, device)

    def foreign(self, data: bytes) -> Slot:
        """A slot with *data* in an arena that is not the engine's: the server's staging."""
        lease = self.arenas.staging(OWNER).lease(len(data), 1)
        lease.view[:] = data
        return lease.slot

    def settle(self) -> None:
        """Wait until the end of an engine has been seen."""
        assert self._hung_up.acquire(timeout=10)

    def _answer(self) -> None:
        while True:
            poll = select.poll()
            for end in (self._wake, *(lease.socket for lease in self._ends.values())):
                poll.register(end, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self._wake.fileno():
                    if self._wake.recv(1) == b"s":
                        return
                    continue
                try:
                    packet, sent_fd = self._ends[fd].receive()
                except Lost:
                    self._ends.pop(fd).close()
                    self._hung_up.release()
                else:
                    self.arenas.answer(self._ends[fd], packet, sent_fd, ENGINE)

    def close(self) -> None:
        self._stop.send(b"s")
        self._thread.join()
        for end in (self._wake, self._stop, *self._ends.values()):
            end.close()
        self.arenas.close()


class Late(Cpu):
    """A device whose layers and copies to host memory are done when they are told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[torch.Tensor, memoryview]] = []
        self._begun = self._done = 0
        self.busy = False  # with layers

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        self.copies.append((data, slot))
        self._begun += 1

    def stored(self) -> Callable[[], bool]:
        begun = self._begun
        return lambda: self._done >= begun

    def computed(self) -> Callable[[], bool]:
        return lambda: not self.busy

    def finish(self) -> None:
        while self.copies:
            super().store(*self.copies.pop())
        self._done = self._begun


def end(keeping: Keeping) -> None:
    """As `EngineLoop.close` does, or the kernel."""
    keeping.close()
    keeping.arenas._lease.close()


@contextmanager
def running(
    server: ServerSide,
    device: Cpu | None = None,
    device_memory: int | None = None,
    state: Path | None = None,
) -> Iterator[Keeping]:
    keeping = server.engine(device, device_memory, state)
    try:
        yield keeping
    finally:
        end(keeping)


def keep(keeping: Keeping, data: torch.Tensor, session: int = 1, layer: int = 2) -> Kept:
    return keeping.keep(data, session=session, owner=OWNER, run=7, layer=layer, ids=IDS)


def kib(count: int, value: int = 0) -> torch.Tensor:
    return torch.full((count, KIB), value, dtype=torch.uint8)


def kept_in(keeping: Keeping, value: int = 1, layer: int = 2, session: int = 1) -> Entry:
    return keeping.entries[keep(keeping, bits(value), session, layer).id]


def evicted(keeping: Keeping, entry: Entry, tier: str = "disk") -> Entry:
    for _ in keeping.tiers.evict(entry.body, tier):
        pass
    assert entry.body.tiers == (tier,)
    return entry


def in_turns(*works: Iterator[None]) -> None:
    """A step of each, until all have ended."""
    left = list(works)
    while left:
        left = [one for one in left if next(one, works) is not works]


def brought(keeping: Keeping, entry: Entry, tier: str) -> Iterator[None]:
    """As a job does that uses *entry*."""
    keeping.hold(entry)
    try:
        yield from keeping.tiers.bring(entry.body, tier)
    finally:
        keeping.let_go(entry)


def used(keeping: Keeping) -> tuple[int, int, int]:
    keeping.settle()
    return keeping.room.slabs.used, keeping.pool.used, keeping.disk.used


def bits(value: int = 1) -> torch.Tensor:
    return torch.full((2, 5, 512), float(value))
