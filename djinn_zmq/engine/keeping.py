"""What an engine keeps: checkpoints and large logits, in slots of arenas it shares with the server.

The engine leases the slots of its own arenas; the server numbers them and keeps their descriptors,
so everything here outlives this process. A successor adopts what the server hands it.
"""

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.engine.devices import Cpu, Device
from djinn_zmq.errors import (
    AccessDenied,
    ArenaFull,
    Lost,
    ProtocolError,
    StaleSlot,
    UnknownCheckpoint,
)
from djinn_zmq.memory.arena import Arena, OwnArena, Pool
from djinn_zmq.settings import Settings
from djinn_zmq.wire.messages import Granted, Kept, Retire, Share, Want
from djinn_zmq.wire.tensors import DTYPES, Slot, Tensor, view

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def new_id() -> int:
    """A number no run or kept tensor of this engine or its predecessors has."""
    return secrets.randbits(62) | 1


@dataclass(slots=True, eq=False)
class Entry:
    kept: Kept
    ids: np.ndarray  # int64 (batch, positions)
    owner: str
    midway: Any = None  # of a session's; lives and dies with this process


class Keeping:
    def __init__(
        self, settings: Settings, lease: LeaseSocket, index: int, device: Device | None = None
    ) -> None:
        """device: whose tensors are kept; a CPU where none is given."""
        self.device = device or Cpu()
        self.pool = Pool(settings.host_memory, settings.arena, self._share, f"engine-{index}")
        self.entries: dict[int, Entry] = {}
        self._lease = lease
        self._foreign: dict[int, tuple[Arena, str]] = {}  # with whose tensors they carry
        self.prepare()

    # ---- arenas

    def _share(self, arena: OwnArena) -> int:
        granted, _ = self._lease.ask(Share(), arena.fd)  # refused: it is closed, never attached
        self.device.attach(arena)
        return granted.arena

    def _arena(self, number: int) -> Arena:
        own = self.pool.arenas.get(number)
        return self._foreign_arena(number)[0] if own is None else own

    def _foreign_arena(self, number: int) -> tuple[Arena, str]:
        """An arena that somebody else leases, and whose tensors it carries. Mapped on first use."""
        found = self._foreign.get(number)
        if found is None:
            granted, fd = self._lease.ask(Want(number))
            if fd is None:
                raise Lost(f"arena {number} came without a descriptor")
            found = self._foreign[number] = (Arena(number, fd), granted.owner)
            self.device.attach(found[0])
        return found

    def on_packet(self, packet: object) -> None:
        """News from the server on the lease socket."""
        if isinstance(packet, Retire) and packet.arena in self._foreign:
            arena, _ = self._foreign.pop(packet.arena)
            self.device.detach(arena)
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

    # ---- tensors in and out

    def keep(
        self,
        data: torch.Tensor,
        *,
        session: int,
        owner: str,
        run: int,
        layer: int,
        ids: np.ndarray,
        midway: Any = None,
        place: str = "",
        base: int = 0,
    ) -> Kept:
        """Copy *data* into a slot of its own. Raises ArenaFull; then nothing has changed.

        midway: of a checkpoint in a session, what else its forward goes on with.

        The copy is complete when the device's `mark`, called afterwards, says so.
        """
        name = NAMES[data.dtype]
        lease = self.pool.lease(data.nbytes, session)
        if data.numel():
            self.device.store(data, lease.view)
        tensor = Tensor(name, tuple(data.shape), lease.slot)
        past = 0 if midway is None else midway.branch.ids.shape[1]
        kept = Kept(new_id(), session, run, layer, tensor, past, place, base)
        self.entries[kept.id] = Entry(kept, ids, owner, midway)
        return kept

    def load(self, tensor: Tensor, buffers: Sequence[bytes | memoryview] = ()) -> torch.Tensor:
        """A wire tensor on the device, wherever its bytes are; one copy, checked after it."""
        data = self._bytes(tensor, buffers)
        out = self.device.fetch(data, tensor.shape, TORCH_DTYPES[tensor.dtype])
        if isinstance(tensor.where, Slot):
            self._arena(tensor.where.arena).check(tensor.where)
        return out

    def _bytes(self, tensor: Tensor, buffers: Sequence[bytes | memoryview]) -> np.ndarray:
        """uint8 (nbytes,) over a wire tensor's bytes. A slot too small for what is claimed is
        refused here, before that much is allocated."""
        if isinstance(tensor.where, Slot):
            arena = self._arena(tensor.where.arena)
            return np.frombuffer(arena.view(tensor.where, tensor.nbytes), np.uint8)
        return view(tensor, buffers).reshape(-1).view(np.uint8)

    def load_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str
    ) -> torch.Tensor:
        """The same for a tensor that a client of *owner*'s sent.

        Raises AccessDenied for a slot of somebody else's: whoever guesses one must not read it.
        """
        self._check_owner(tensor, owner)
        return self.load(tensor, buffers)

    def ids_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str
    ) -> np.ndarray:
        """A client's token ids, int64, copied to host memory whatever the device."""
        self._check_owner(tensor, owner)
        if tensor.dtype != "int64":
            raise ProtocolError(f"token ids of dtype {tensor.dtype}: int64")
        ids = self._bytes(tensor, buffers).copy()
        if isinstance(tensor.where, Slot):
            self._arena(tensor.where.arena).check(tensor.where)
        return ids.view(np.int64).reshape(tensor.shape)

    def _check_owner(self, tensor: Tensor, owner: str) -> None:
        if not isinstance(tensor.where, Slot):
            return
        number = tensor.where.arena
        if number in self.pool.arenas or self._foreign_arena(number)[1] != owner:
            raise AccessDenied(f"arena {number} is not yours to send tensors in")

    def find(self, number: int, owner: str) -> Entry:
        """The kept tensor *number*, if *owner* may see it."""
        entry = self.entries.get(number)
        if entry is None or entry.owner != owner:
            raise UnknownCheckpoint(
                f"checkpoint {number:x} does not exist or is not yours: it may have been released"
            )
        return entry

    # ---- ends

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            entry = self.entries.pop(number, None)
            if entry is not None and isinstance(entry.kept.tensor.where, Slot):
                self.pool.give_back(entry.kept.tensor.where)

    def drop_session(self, session: int) -> None:
        """All that *session* has, whether anybody was told of it or not."""
        self.entries = {n: e for n, e in self.entries.items() if e.kept.session != session}
        self.pool.reclaim(session)

    def adopt(self, kepts: Sequence[Kept], ids: np.ndarray, owner: str) -> list[int]:
        """Take over a predecessor's tensors. Returns the numbers of those that are lost."""
        lost = []
        for kept in kepts:
            where = kept.tensor.where
            try:
                if not isinstance(where, Slot):
                    raise Lost("it was on a device")
                self._own(where.arena).adopt(where, kept.tensor.nbytes, kept.session)
            except (Lost, StaleSlot, ProtocolError):
                lost.append(kept.id)
                continue
            self.entries[kept.id] = Entry(kept, ids, owner)
        return lost

    def _own(self, number: int) -> OwnArena:
        """A predecessor's arena, ours to lease from now on."""
        if number not in self.pool.arenas:
            _, fd = self._lease.ask(Want(number))
            if fd is None:
                raise Lost(f"arena {number} came without a descriptor")
            arena = self.pool.arenas[number] = OwnArena(number, fd)
            self.device.attach(arena)
        return self.pool.arenas[number]

    def finish_adopting(self) -> None:
        """Slots of adopted arenas that nobody claimed were in the dead engine's hands: free them."""
        for arena in self.pool.arenas.values():
            arena.sweep_unleased()

    def close(self) -> None:
        self.pool.close()
        for foreign, _ in self._foreign.values():
            foreign.close()
