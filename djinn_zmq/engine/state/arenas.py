"""The shared memory an engine works in: arenas of its own, whose slots it leases, and others' that it
reads from.

The server numbers them all and keeps their descriptors, so that they outlive this process.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.engine.device.devices import Device
from djinn_zmq.errors import AccessDenied, ArenaFull, Lost, ProtocolError, StartError
from djinn_zmq.memory.arena import Arena, OwnArena, Pool
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire.messages import Granted, Retire, Share, Want
from djinn_zmq.wire.tensors import Slot, Tensor

ARENAS = 4
LEAST_ARENA = 1 * MIB


class Arenas:
    def __init__(
        self,
        settings: Settings,
        lease: LeaseSocket,
        index: int,
        device: Device,
        made: Callable[[], object],
    ) -> None:
        """made: called, in another thread, when one that `grow` began has been made."""
        limit = settings.host_memory
        # Several even of a small one: an arena is one owner's.
        nbytes = min(settings.arena, max(limit // ARENAS, LEAST_ARENA))
        self.pool = Pool(limit, nbytes, self._share, f"engine-{index}", self._retire)
        self._device = device
        self._lease = lease
        self._made = made
        self._foreign: dict[int, tuple[Arena, str]] = {}  # with whose tensors they carry
        # One: several take turns at the process's one memory map. 2.8 GiB/s of fresh pages on a 16-core
        # machine, registered with CUDA, against 1.4 to 2.5 with four.
        self._grower = ThreadPoolExecutor(1, "djinn-arenas")

    def _share(self, arena: OwnArena) -> int:
        granted, _ = self._lease.ask(Share(), arena.fd)  # refused: it is closed, never attached
        try:
            self._device.attach(arena)
        except BaseException:
            self._lease.send(Retire(granted.arena))  # else the server keeps its pages for nobody
            raise
        return granted.arena

    def grow(self, nbytes: int) -> "Future[OwnArena]":
        """One more arena, its pages taken in a thread that sleeps in system calls. It is registered by
        us, at 2 ms for 64 MiB: a thread that registers holds CUDA's lock, and layers wait for it."""
        future = self._grower.submit(self.pool.make, nbytes)
        future.add_done_callback(lambda _: self._made())
        return future

    def _retire(self, arena: OwnArena) -> None:
        """*arena* is empty and makes room for one of another owner's."""
        self._device.detach(arena)
        self._lease.send(Retire(arena.number))

    def find(self, number: int) -> Arena:
        own = self.pool.arenas.get(number)
        return self._foreign_one(number)[0] if own is None else own

    def _foreign_one(self, number: int) -> tuple[Arena, str]:
        """An arena that somebody else leases, and whose tensors it carries. Mapped on first use."""
        found = self._foreign.get(number)
        if found is None:
            granted, fd = self._lease.ask(Want(number))
            if fd is None:
                raise Lost(f"arena {number} came without a descriptor")
            found = self._foreign[number] = (Arena(number, fd), granted.owner)
            self._device.attach(found[0])
        return found

    def on_packet(self, packet: object) -> None:
        """News from the server on the lease socket."""
        if isinstance(packet, Retire) and packet.arena in self._foreign:
            arena, _ = self._foreign.pop(packet.arena)
            self._device.detach(arena)
            arena.close()
        elif not isinstance(packet, (Retire, Granted)):
            raise ProtocolError(f"{type(packet).__name__} is not for an engine")

    def prepare(self) -> None:
        """Make the first arena while nobody waits for it: its pages take a tenth of a second.

        A predecessor's arenas, still to be adopted, may have all the room: then there is none yet.
        """
        if not self.pool.arenas:
            with contextlib.suppress(ArenaFull):
                self.pool.grow(1)

    def check_owner(self, tensor: Tensor, owner: str) -> None:
        """Raises AccessDenied for a slot of somebody else's: whoever guesses one must not read it."""
        if not isinstance(tensor.where, Slot):
            return
        number = tensor.where.arena
        if number in self.pool.arenas or self._foreign_one(number)[1] != owner:
            raise AccessDenied(f"arena {number} is not yours to send tensors in")

    def own(self, number: int) -> OwnArena:
        """A predecessor's arena, ours to lease from now on."""
        if number not in self.pool.arenas:
            _, fd = self._lease.ask(Want(number))
            if fd is None:
                raise Lost(f"arena {number} came without a descriptor")
            try:
                self.pool.arenas[number] = self._attached(OwnArena(number, fd))
            except (ArenaFull, StartError) as exc:
                # Of what is adopted, what is in it alone is lost.
                self._lease.send(Retire(number))
                raise Lost(f"arena {number}: {exc}") from exc
        return self.pool.arenas[number]

    def _attached(self, arena: OwnArena) -> OwnArena:
        try:
            self._device.attach(arena)
        except BaseException:
            arena.close()
            raise
        return arena

    def close(self) -> None:
        self._grower.shutdown()
        self.pool.close()
        for foreign, _ in self._foreign.values():
            foreign.close()
