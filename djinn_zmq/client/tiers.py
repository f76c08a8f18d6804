"""Where a checkpoint is, and what can be done about that: move it, save it, edit it in place."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.arrays import RemoteArray
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.session import Session
from djinn_zmq.errors import BadFile, RequestError
from djinn_zmq.settings import counted
from djinn_zmq.wire import tiers
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import DTYPES
from djinn_zmq.wire.tiers import Kept


class Tiered:
    """What a checkpoint has of this: it is mixed into `Checkpoint`."""

    _session: Session
    _kept: Kept
    _ids: np.ndarray

    @property
    def tier(self) -> Any:
        """The fastest tier that has it now: "device", "host" or "disk"."""
        return self._session.drive(self._tier())

    def _tier(self) -> Operation[str]:
        yield from self._locate()
        return self._kept.tiers[0]

    def _locate(self) -> Operation[None]:
        reply = yield Call(Op.WHERE, tiers.Where((self._kept.id,)), session=self._kept.session)
        self._kept = reply.meta.kept[0]

    def prefetch(self, to: str = "") -> Any:
        """Bring it to the tier *to*, "device" or "host"; by default the fastest that there is.

        Returns the tier it is in then. Raises ArenaFull, with sizes, where that has no room.
        """
        return self._session.drive(
            self._move(checks.one_of("to", to, ("device", "host", "")), down=False)
        )

    def evict(self, to: str = "host") -> Any:
        """Move it down to "host" or "disk", which makes room in the tiers above.

        Returns the tier it is in then. Raises RequestError where a view of it is in use or there is
        no such tier, ArenaFull where that has no room.
        """
        return self._session.drive(self._move(checks.one_of("to", to, ("host", "disk")), down=True))

    def _move(self, to: str, *, down: bool) -> Operation[str]:
        meta = tiers.Move((self._kept.id,), to, down)
        reply = yield Call(Op.MOVE, meta, session=self._kept.session)
        self._kept = reply.meta.kept[0]
        return self._kept.tiers[0]

    def save(self, path: str | os.PathLike[str]) -> Any:
        """Write it to the file *path* (safetensors), whole or not at all, over a file that is there.
        Returns the path. Raises BadFile, by name, where something else is, or it cannot be written.

        Any client of the same model makes a checkpoint of it again, with `Model.load_checkpoint`.
        """
        return self._session.drive(self._save(checks.path("path", path)))

    def _save(self, path: Path) -> Operation[Path]:
        if self._kept.place:
            raise RequestError(
                f"the checkpoint is inside a layer, at {self._kept.place}: save one between layers"
            )
        if self._kept.past:
            raise RequestError(
                f"the checkpoint goes on from the keys and values of {counted(self._kept.past, 'token')}, which "
                "are not in it: save one of a plain run of all its tokens"
            )
        from djinn_zmq.memory import files  # on first use: few clients write any

        files.check_target(path)
        hidden = yield from self._remote()._read(())
        facts = {"format": files.FORMAT, "layer": str(self._kept.layer)}
        try:
            files.write(
                path,
                {"hidden": hidden, "ids": self._ids},
                facts | files.facts_of(self._session.model),
            )
        except OSError as exc:
            raise BadFile(f"{path} cannot be written: {exc.strerror}") from exc
        return path

    def writable(self) -> Any:
        """The hidden state as an array to edit in place and resume with: `resume(hidden=array)`.

        On the server's machine it lies in memory that the engine reads where it stands: nothing is
        copied again. It is this client's own: the checkpoint does not change. Not to be written to
        while a resume with it is under way.
        """
        return self._session.drive(self._writable())

    def _writable(self) -> Operation[np.ndarray]:
        tensor = self._kept.tensor
        sharing = self._session.connection.sharing
        if sharing.lease is None:
            return (yield from self._remote()._read(()))
        array = sharing.array(DTYPES[tensor.dtype], tensor.shape)
        yield from self._remote()._read_into(array)
        return array

    def hidden_cuda(self) -> Any:
        """The hidden state where it stands in the GPU, without a copy: a torch tensor where torch is
        imported, else a cupy array (of bfloat16: uint16). Speaks DLPack.

        Read only: writing to it would change the checkpoint; use `writable_cuda`. It keeps the
        checkpoint in place as long as it lives; the end of the connection or the engine ends it.
        Only on the server's machine; needs cupy. Raises ArenaFull where the device tier has no room.
        """
        return self._session.drive(self._cuda(copy=False))

    def writable_cuda(self) -> Any:
        """The same of a copy that is this client's own: edit it in place, then
        `resume(hidden=tensor)`, as often as you like; the resume waits for edits on any stream.
        Layers read it where it stands. A resume that stops where it begins keeps it: that is one copy
        within the GPU, made by this process. The checkpoint does not change."""
        return self._session.drive(self._cuda(copy=True))

    def _cuda(self, *, copy: bool) -> Operation[Any]:
        connection, session = self._session.connection, self._kept.session
        cuda = connection.sharing.cuda()
        meta = tiers.Hold(self._kept.id, "device", copy)
        reply = yield Call(Op.HOLD, meta, session=session)
        held = reply.meta

        def end() -> None:
            connection.leftovers.add(session, held.hold)

        try:
            if copy:
                return cuda.writable(held.tensor, held.handle, held.spare, end)
            return cuda.tensor(held.tensor, held.handle, end)
        except BaseException:
            end()
            raise

    def _remote(self) -> RemoteArray:
        return RemoteArray(self._session.connection, self._session.drive, self._kept, self)


@dataclass(frozen=True, slots=True)
class Returned:
    """A checkpoint that came back from the disk with its server, before a session has it.

    layer: layers executed before it. shape: (batch, positions, hidden_size). dtype, nbytes: of that.
    """

    id: int
    layer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int

    @classmethod
    def of(cls, kept: Kept) -> "Returned":
        tensor = kept.tensor
        return cls(kept.id, kept.layer, tensor.shape, DTYPES[tensor.dtype], tensor.nbytes)

    def __repr__(self) -> str:
        return f"<returned {self.id:#x} after layer {self.layer}: {self.dtype} {self.shape}, disk>"


def load(session: Session, path: Path) -> Operation[tuple[Message, np.ndarray]]:
    """Make a checkpoint of the file *path*: what that is answered with, and its ids. Raises BadFile."""
    from djinn_zmq.memory import files  # on first use: few clients read any

    saved = files.read(path)
    files.check_model(saved, session.model)
    if needs := saved.metadata.get(files.NEEDS):
        raise BadFile(f"{path} takes more than a file to go on from: {needs}")
    ids = files.load(saved, saved.ids)
    sharing = session.connection.sharing
    dtype, shape = DTYPES[saved.hidden.dtype], saved.hidden.shape
    # Where the engine reads it, if memory is shared: nothing is copied again.
    hidden = np.empty(shape, dtype) if sharing.lease is None else sharing.array(dtype, shape)
    files.read_into(saved, saved.hidden, memoryview(hidden.reshape(-1).view(np.uint8)))
    parcel = Parcel(session.connection, session.id)
    try:
        hidden_sent = yield from parcel.place(hidden)
        ids_sent = yield from parcel.place(ids)
        meta = tiers.Restore(saved.layer, hidden_sent, ids_sent)
        call = Call(Op.RESTORE, meta, session=session.id, buffers=parcel.buffers)
        reply = yield call
    finally:
        parcel.settle()
    return reply, ids


def away(session: Session, expected_s: float) -> Operation[None]:
    found_s = checks.seconds("expected_s", expected_s)
    if found_s == float("inf"):
        raise RequestError("expected_s=inf: a finite number of seconds")
    yield Call(Op.AWAY, tiers.Away(found_s), session=session.id)


def back_soon(session: Session) -> Operation[None]:
    yield Call(Op.AWAY, tiers.Away(0.0), session=session.id)


def claim(session: Session, numbers: Sequence[int]) -> Operation[tiers.ClaimReply]:
    """No numbers: what there is."""
    reply = yield Call(Op.CLAIM, tiers.Claim(tuple(numbers)), session=session.id)
    return reply.meta
