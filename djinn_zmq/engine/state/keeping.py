"""What an engine keeps: checkpoints and large logits, in slots of arenas it shares with the server.

Their memory outlives this process (`arenas.py`): a successor adopts what the server hands it.
"""

import contextlib
import itertools
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.engine.device.devices import Cpu, Device
from djinn_zmq.engine.device.slabs import Slabs, Spare
from djinn_zmq.engine.state.arenas import Arenas
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.engine.state.disk import Disk
from djinn_zmq.engine.state.holds import Holds
from djinn_zmq.engine.state.room import Room
from djinn_zmq.engine.state.tiers import Tiers
from djinn_zmq.engine.state.vault import Vault
from djinn_zmq.errors import (
    BadFile,
    Lost,
    OnDevice,
    ProtocolError,
    StaleSlot,
    UnknownCheckpoint,
)
from djinn_zmq.memory.files import FORMAT, MARK, NEEDS
from djinn_zmq.settings import Settings
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.tensors import DTYPES, File, Slot, Tensor, Where, view
from djinn_zmq.wire.tensors import Device as DeviceWhere

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
LOCAL_OWNER = f"uid:{os.getuid()}"
NO_FACTS: Mapping[str, str] = MappingProxyType({})


_first = secrets.randbits(61)
_count = itertools.count(1).__next__


def new_id() -> int:
    """A number no run or kept tensor of this engine or its predecessors has.

    Counted from a random start: whose a number is is checked, so it need not be hard to guess.
    """
    return _first + _count()


def _zone(owner: str) -> str:
    """Who may map what *owner* keeps: processes of the server's own user, if it is theirs; else
    nobody."""
    return owner if owner == LOCAL_OWNER else ""


@dataclass(slots=True, eq=False)
class Entry:
    """A checkpoint, or logits that were too large for a frame."""

    id: int
    session: int
    run: int
    layer: int  # -1: not a checkpoint
    body: Body
    midway: Any = None  # of a session's; lives and dies with this process
    past: int = 0  # positions whose keys and values it goes on from
    place: str = ""  # as in Kept
    base: int = 0

    @property
    def ids(self) -> np.ndarray:
        return self.body.ids  # int64 (batch, positions)

    @property
    def owner(self) -> str:
        return self.body.owner

    @property
    def kept(self) -> Kept:
        """As others know it, with where it is now."""
        body = self.body
        return Kept(
            self.id,
            self.session,
            self.run,
            self.layer,
            body.tensor,
            self.past,
            self.place,
            self.base,
            body.tiers,
        )


class Keeping:
    def __init__(
        self, settings: Settings, lease: LeaseSocket, index: int, device: Device | None = None
    ) -> None:
        """device: whose tensors are kept; a CPU where none is given."""
        self.device = device or Cpu()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.arenas = Arenas(settings, lease, index, self.device, self._awake)
        self.pool = self.arenas.pool
        self.entries: dict[int, Entry] = {}
        self.moves: list[tuple[Entry, str, int]] = []  # what moved, how, ns: still to be told
        self._adopted_bodies: dict[Where, Body] = {}
        budget = settings.device_memory
        slabs = Slabs(self.device.budget() if budget is None else budget, self.device.allocate)
        folder = Path(settings.state) if settings.state and settings.disk else None
        self.disk = Disk(folder, settings.disk, self._awake)
        grow = self.arenas.grow
        self.room = Room(self.device, slabs, self.pool, self.disk, self._moved, grow)
        self.tiers = Tiers(self.device, self.room, self._moved)
        self.holds = Holds(self.room, self.tiers)
        # Of the device's budget, which a CPU has only where somebody said so.
        self.vault = Vault(self.device, self.room, slabs.limit or None)
        self.room.more = lambda: self.holds.give_room() or self.vault.drop_copies()
        self.arenas.prepare()

    def fileno(self) -> int:
        """Readable when something has been done beside us: then `settle`."""
        return self._wake

    def _awake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def settle(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self.vault.settle()
        self.room.settle()
        self.room.write_behind()

    def _moved(self, body: Body, how: str, elapsed_ns: int) -> None:
        self.moves += ((self.entries[number], how, elapsed_ns) for number in body.checkpoints)

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
        facts: Mapping[str, str] = NO_FACTS,
    ) -> Kept:
        """Copy *data* into slots of its own. Raises ArenaFull; then nothing has changed.

        midway: of a checkpoint in a session, what else its forward goes on with.

        The copies are complete when the device's `computed` and `stored`, called afterwards, say so. facts: what a
        file of it would say of its model.
        """
        shape = tuple(data.shape)
        body = self._body(NAMES[data.dtype], shape, data.nbytes, session, owner, layer, ids, facts)
        self.tiers.place(body, data)
        entry = Entry(new_id(), session, run, layer, body, midway, 0, place, base)
        return self._enter(entry)

    def keep_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], like: Entry, run: int
    ) -> Kept:
        """A checkpoint of what a client sent to stand in the place of *like*, copied from where it is.

        Raises AccessDenied, ArenaFull. Complete when the device's `computed` says so.
        """
        owner = like.body.owner
        data: torch.Tensor | np.ndarray
        if isinstance(tensor.where, DeviceWhere):
            data = self.holds.find(tensor, owner)
        else:
            self.arenas.check_owner(tensor, owner)
            data = self._bytes(tensor, buffers)
        body = self._body_like(like)
        self.tiers.place(body, data)
        return self._enter(Entry(new_id(), like.session, run, like.layer, body))

    def take_over(self, spare: Spare, like: Entry, run: int) -> Kept:
        """The same of what a client has put into a spare, which is no hold's any more: nothing is
        copied, and it is complete."""
        body = self._body_like(like)
        self.tiers.take_over(body, spare)
        return self._enter(Entry(new_id(), like.session, run, like.layer, body))

    def _body_like(self, like: Entry) -> Body:
        """Without its bytes."""
        was = like.body
        return Body(
            was.dtype,
            was.shape,
            was.nbytes,
            like.session,
            was.owner,
            was.zone,
            was.ids,
            {**was.facts},
        )

    def share(self, entry: Entry, run: int, midway: Any = None) -> Kept:
        """Another checkpoint of the same bytes: nothing is copied."""
        self.room.touch(entry.body)
        return self._enter(Entry(new_id(), entry.session, run, entry.layer, entry.body, midway))

    def _enter(self, entry: Entry) -> Kept:
        if entry.midway is not None:
            entry.past = entry.midway.branch.ids.shape[1]
        if entry.past or entry.place:  # a file of it alone is not enough to go on from
            entry.body.facts[NEEDS] = entry.place or f"{entry.past} tokens' keys and values"
        self.entries[entry.id] = entry
        self.room.share(entry.body, entry.id)
        return entry.kept

    def _body(
        self,
        dtype: str,
        shape: tuple[int, ...],
        nbytes: int,
        session: int,
        owner: str,
        layer: int,
        ids: np.ndarray,
        facts: Mapping[str, str],
    ) -> Body:
        return Body(
            dtype=dtype,
            shape=shape,
            nbytes=nbytes,
            session=session,
            owner=owner,
            zone=_zone(owner),
            ids=ids,
            facts={"format": FORMAT, "owner": owner, "layer": str(layer), **facts},
            fixed=layer < 0,
        )

    def hold(self, entry: Entry) -> None:
        """Somebody reads it: it stays where it is until `let_go`."""
        entry.body.users += 1

    def let_go(self, entry: Entry) -> None:
        self.room.leave(entry.body)

    def resident(self, entry: Entry) -> bool:
        """Is it where the device can read it?"""
        return entry.body.resident

    def ready(self, entry: Entry) -> bool:
        """Is it where layers take it from, and nothing to be waited for?"""
        body = entry.body
        if body.device is not None:
            return body.arrived
        return body.resident and self.device.reads_host and not self.room.slabs.limit

    def promote(self, entry: Entry) -> bool:
        """Begin to copy it up to the device. False where it is not in host memory, or there is no
        room for it."""
        body = entry.body
        if body.host is not None and body.resident and not self.device.reads_host:
            self.room.touch(body)
            self.tiers.promote(body)
        return body.device is not None

    def bring(self, entry: Entry) -> Iterator[None]:
        """Make it resident. Raises ArenaFull, BadFile."""
        return self.tiers.bring(entry.body)

    def fits(self, nbytes: int, owner: str) -> bool:
        return self.pool.ready(nbytes, _zone(owner))

    def make_room(self, nbytes: int, owner: str) -> Iterator[None]:
        """Until it fits, or nothing more can be done for that."""
        return self.room.make(nbytes, _zone(owner))

    def hidden(self, entry: Entry) -> torch.Tensor:
        """Its bytes on the device, to be read only by one who counts as a user. Resident ones."""
        self.room.touch(entry.body)
        return self.tiers.hidden(entry.body)

    def load(self, tensor: Tensor, buffers: Sequence[bytes | memoryview] = ()) -> torch.Tensor:
        """A wire tensor on the device, wherever its bytes are; one copy, checked after it."""
        data = self._bytes(tensor, buffers)
        out = self.device.fetch(data, tensor.shape, TORCH_DTYPES[tensor.dtype])
        if isinstance(tensor.where, Slot):
            self.arenas.find(tensor.where.arena).check(tensor.where)
        return out

    def _bytes(self, tensor: Tensor, buffers: Sequence[bytes | memoryview]) -> np.ndarray:
        """uint8 (nbytes,) over a wire tensor's bytes. A slot too small for what is claimed is
        refused here, before that much is allocated."""
        if isinstance(tensor.where, Slot):
            arena = self.arenas.find(tensor.where.arena)
            return np.frombuffer(arena.view(tensor.where, tensor.nbytes), np.uint8)
        return view(tensor, buffers).reshape(-1).view(np.uint8)

    def load_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str
    ) -> torch.Tensor:
        """The same for a tensor that a client of *owner*'s sent.

        Raises AccessDenied for a slot of somebody else's: whoever guesses one must not read it.
        """
        self.arenas.check_owner(tensor, owner)
        return self.load(tensor, buffers)

    def see_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str
    ) -> torch.Tensor:
        """As `load_sent`, to be read only: where it stands, if the device can read it there."""
        if isinstance(tensor.where, DeviceWhere):
            data = self.holds.find(tensor, owner)
            return data.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)
        self.arenas.check_owner(tensor, owner)
        data = self._bytes(tensor, buffers)
        return self.device.see(data, tensor.shape, TORCH_DTYPES[tensor.dtype])

    def check_sent(self, tensor: Tensor) -> None:
        """Raises StaleSlot where what a client sent in a slot is not there any more, and has been read since: what has
        come of that is of no use."""
        if isinstance(tensor.where, Slot):
            try:
                self.arenas.find(tensor.where.arena).check(tensor.where)
            except StaleSlot as exc:
                raise StaleSlot(
                    f"what was sent was released before it was answered: {exc}"
                ) from exc

    def ids_sent(
        self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str
    ) -> np.ndarray:
        """A client's token ids, int64, copied to host memory whatever the device."""
        if tensor.dtype != "int64":
            raise ProtocolError(f"token ids of dtype {tensor.dtype}: int64")
        return self.sent(tensor, buffers, owner)

    def sent(self, tensor: Tensor, buffers: Sequence[bytes | memoryview], owner: str) -> np.ndarray:
        """What a client sent, copied to host memory: to be checked before a device sees it."""
        self.arenas.check_owner(tensor, owner)
        data = self._bytes(tensor, buffers).copy()
        if isinstance(tensor.where, Slot):
            self.arenas.find(tensor.where.arena).check(tensor.where)
        return data.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def find(self, number: int, owner: str) -> Entry:
        """The kept tensor *number*, if *owner* may see it."""
        entry = self.entries.get(number)
        if entry is None or entry.owner != owner:
            raise UnknownCheckpoint.numbered(number)
        return entry

    # ---- ends

    def drop(self, numbers: Sequence[int], session: int | None = None) -> None:
        """End checkpoints, kept logits and holds. session: only those that are its own."""
        for number in numbers:
            entry = self.entries.get(number)
            if entry is not None and session in (None, entry.session):
                del self.entries[number]
                self.room.release(entry.body, number)
            elif number in self.holds and session in (None, self.holds.session_of(number)):
                self.holds.end(number, gone=False)

    def has(self, number: int, session: int) -> bool:
        """Is *number* a checkpoint, kept logits or a hold of *session*?"""
        entry = self.entries.get(number)
        if entry is not None:
            return entry.session == session
        return number in self.holds and self.holds.session_of(number) == session

    def drop_session(self, session: int) -> None:
        """All that *session* has, whether anybody was told of it or not."""
        self.drop([number for number, one in self.entries.items() if one.session == session])
        for number in self.holds.of(session):
            self.holds.end(number, gone=True)
        self.room.forget_session(session)

    def adopt(
        self,
        kepts: Sequence[Kept],
        ids: np.ndarray,
        owner: str,
        facts: Mapping[str, str] = NO_FACTS,
    ) -> list[int]:
        """Take over a predecessor's tensors, or files of a server that is gone. Returns the numbers
        of those that are lost."""
        lost = []
        for kept in kepts:
            try:
                body = self._adopted(kept, ids, owner, facts)
            except (Lost, OnDevice, ProtocolError, BadFile):
                lost.append(kept.id)
                continue
            entry = Entry(kept.id, kept.session, kept.run, kept.layer, body)
            entry.past, entry.place, entry.base = kept.past, kept.place, kept.base
            self.entries[kept.id] = entry
            body.checkpoints.add(kept.id)
            if isinstance(kept.tensor.where, Slot) and body.host is None:
                self.moves.append((entry, "evict", 0))
        return lost

    def _adopted(self, kept: Kept, ids: np.ndarray, owner: str, facts: Mapping[str, str]) -> Body:
        tensor, where = kept.tensor, kept.tensor.where
        if where in self._adopted_bodies:  # checkpoints of the same bytes share them again
            return self._adopted_bodies[where]
        args = (tensor.dtype, tensor.shape, tensor.nbytes, kept.session, owner, kept.layer)
        body = self._body(*args, ids, facts)
        if isinstance(where, Slot):
            try:
                arena = self.arenas.own(where.arena)
                body.host = arena.adopt(where, tensor.nbytes, kept.session)
                arena.zone = body.zone
            except (Lost, OnDevice, ProtocolError):  # not filled yet, or gone before that was told
                if "disk" not in kept.tiers:
                    raise
        if "disk" in kept.tiers and self.disk.folder is not None:
            self._adopt_file(body, kept.id, where.mark if isinstance(where, File) else "")
        if body.host is None and not body.disk:
            raise Lost("it was on a device")
        self.room.add(body)
        self._adopted_bodies[where] = body
        return body

    def _adopt_file(self, body: Body, number: int, mark: str) -> None:
        """Its file, where that holds what it should. Raises BadFile where nothing else does."""
        try:
            saved = self.disk.stored(number, mark)
            if (saved.hidden.dtype, saved.hidden.shape) != (body.dtype, body.shape):
                raise BadFile(f"{saved.path} holds {saved.hidden.dtype} {saved.hidden.shape}")
            said = saved.metadata
            if other := [name for name, is_ in body.facts.items() if said.get(name, is_) != is_]:
                raise BadFile(f"{saved.path} is another checkpoint's: its {other[0]} differs")
        except BadFile:
            if body.host is None:
                raise
            return
        if MARK in said:
            body.facts[MARK] = said[MARK]
        body.disk = number
        self.disk.used += body.nbytes

    def finish_adopting(self) -> None:
        """Slots of adopted arenas that nobody claimed were in the dead engine's hands: free them."""
        self._adopted_bodies.clear()
        for arena in self.pool.arenas.values():
            arena.sweep_unleased()

    def close(self) -> None:
        self.disk.close()
        self.entries.clear()
        self.holds.close()
        self.moves.clear()
        self._adopted_bodies.clear()
        self.room.close()
        self.tiers.close()
        self.vault.close()
        self.arenas.close()
        os.close(self._wake)
