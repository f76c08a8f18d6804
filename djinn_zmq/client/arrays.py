"""Arrays that stay on the server until somebody looks at them."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from djinn_zmq.client.calls import PIECE, Call, Operation
from djinn_zmq.client.connection import Connection
from djinn_zmq.client.indexing import index_of
from djinn_zmq.errors import (
    AccessDenied,
    Lost,
    OnDevice,
    ProtocolError,
    StaleSlot,
    UnknownCheckpoint,
)
from djinn_zmq.wire.edits import Index, selection
from djinn_zmq.wire.messages import Kept, Read
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import DTYPES, Slot, Tensor, over
from djinn_zmq.wire.tiers import Hold, Move, Where

Drive = Callable[[Operation[Any]], Any]

TRIES = 3  # to map it where it is, while it moves


def read_only(array: np.ndarray) -> np.ndarray:
    """*array* as it is shown: what is written into it would change what is sent or said later."""
    shown = array.view()
    shown.flags.writeable = False
    return shown


class RemoteArray:
    """A kept tensor, read as numpy arrays: `array[0, -1]` moves that row, `np.asarray` all of it.

    shape, dtype, ndim, nbytes, size: as numpy's; bfloat16 is ml_dtypes' own.
    What is read is a copy, writable and the reader's own. Raises Lost, UnknownCheckpoint where the
    tensor is no more, SelectionError (an IndexError) for an index it does not have.
    """

    def __init__(self, connection: Connection, drive: Drive, kept: Kept, owner: object) -> None:
        """owner: what keeps the tensor from being released; held as long as this array."""
        self._connection = connection
        self._drive = drive
        self._kept = kept
        self._owner = owner
        self.shape: tuple[int, ...] = kept.tensor.shape
        self.dtype = DTYPES[kept.tensor.dtype]
        self.nbytes: int = kept.tensor.nbytes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        # Without it Python would index until an IndexError, which no awaitable raises in time.
        return (self[row] for row in range(len(self)))

    def __getitem__(self, at: Any) -> Any:
        return self._drive(self._read(index_of(at)))

    def fetch(self) -> Any:
        """All of it, as a numpy array."""
        return self._drive(self._read(()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:  # as numpy's protocol has it
            raise ValueError("what is on the server is copied: copy=False is what view() does")
        array = self.fetch()
        if not isinstance(array, np.ndarray):
            array.close()
            raise TypeError("in asyncio code use `await array.fetch()` in np.asarray's place")
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self.dtype} array of shape {self.shape}, on the server>"

    def _read(self, index: Index) -> Operation[np.ndarray]:
        chosen = selection(index, self.shape, "the array")
        copy = yield from self._copied(lambda whole: np.array(whole[chosen]))
        return (yield from self._pull(index)) if copy is None else copy

    def _read_into(self, target: np.ndarray) -> Operation[None]:
        """All of it, into an array of its shape and dtype."""

        def take(whole: np.ndarray) -> np.ndarray:
            target[...] = whole
            return target

        if (yield from self._copied(take)) is None:
            target[...] = yield from self._pull(())

    def _copied(self, take: Callable[[np.ndarray], np.ndarray]) -> Operation[np.ndarray | None]:
        """What *take* makes of the shared slot it is in, once it has stood still meanwhile; None where it is in
        none that can be mapped. Raises Lost where it was released."""
        for _ in range(TRIES):
            whole = yield from self._whole()
            if whole is None:
                return None
            copy = take(whole)
            if self._stands():
                return copy
        return None

    def view(self) -> Any:
        """All of it, read-only, where it stands: nothing is copied.

        On the server's machine the array lies in the engine's own slot. It is good for as long as it
        lives: that keeps the checkpoint from being evicted or its slot from being used again, also
        after a `release`; the end of the connection or the engine ends it. From elsewhere it is a
        copy.
        """
        return self._drive(self._view())

    def _view(self) -> Operation[np.ndarray]:
        sharing, kept = self._connection.sharing, self._kept
        if sharing.lease is None:
            array = yield from self._pull(())
            array.flags.writeable = False
            return array
        reply = yield Call(Op.HOLD, Hold(kept.id, "host", False), session=kept.session)
        try:
            slot = reply.meta.tensor.where
            root = np.frombuffer(sharing.arena(slot.arena).view(slot, self.nbytes), np.uint8)
            end = weakref.finalize(
                root, self._connection.leftovers.add, kept.session, reply.meta.hold
            )
            end.atexit = False
        except BaseException:  # it moved, or a KeyboardInterrupt
            self._connection.give_back(reply)
            raise
        return root.view(self.dtype).reshape(self.shape)

    def _whole(self) -> Operation[np.ndarray | None]:
        """The shared slot it is in now, as an array; None where it is in none that can be mapped.

        Nobody is asked while it is where it was. Raises Lost where it was released.
        """
        sharing, session = self._connection.sharing, self._kept.session
        for _ in range(TRIES):
            tensor = self._kept.tensor
            if not sharing.can_map(tensor):
                return None
            assert isinstance(tensor.where, Slot)
            try:
                data = sharing.arena(tensor.where.arena).view(tensor.where, tensor.nbytes)
                return over(data, tensor.dtype, tensor.shape)
            except (StaleSlot, AccessDenied):  # moved since
                call = Call(Op.WHERE, Where((self._kept.id,)), session=session)
            except OnDevice:  # still on its way there: the engine says when it has come
                call = Call(Op.MOVE, Move((self._kept.id,), "host", False), session=session)
            try:
                reply = yield call
            except UnknownCheckpoint as exc:
                raise Lost(f"{self!r} is no more: it was released") from exc
            self._kept = reply.meta.kept[0]
        return None

    def _stands(self) -> bool:
        """Is what was just copied still where it was?"""
        where = self._kept.tensor.where
        assert isinstance(where, Slot)
        try:
            self._connection.sharing.arena(where.arena).check(where)
        except StaleSlot:
            return False
        return True

    def _pull(self, index: Index) -> Operation[np.ndarray]:
        """Pieces over the bus, several asked for at once."""
        try:
            first = yield self._piece(index, 0)
        except OnDevice:
            move = Move((self._kept.id,), "host", False)
            yield Call(Op.MOVE, move, session=self._kept.session)
            first = yield self._piece(index, 0)
        meta = first.meta
        pieces = [first]
        shape = tuple(meta.shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        if nbytes > PIECE:
            pieces += yield [self._piece(index, offset) for offset in range(PIECE, nbytes, PIECE)]
        came = sum(len(piece.buffers[0]) for piece in pieces)
        if came != nbytes:  # else some of it would be whatever was in the memory before
            raise ProtocolError(f"{came} bytes came of {self.dtype} {shape}, which takes {nbytes}")
        out = np.empty(nbytes, np.uint8)
        place = 0
        for piece in pieces:
            data = np.frombuffer(piece.buffers[0], np.uint8)
            out[place : place + data.size] = data
            place += data.size
        return out.view(self.dtype).reshape(shape)

    def _piece(self, index: Index, offset: int) -> Call:
        kept = self._kept
        return Call(Op.READ, Read(kept.id, index, offset, PIECE), session=kept.session)


def left_behind(
    connection: Connection, drive: Drive, session: int, number: int, tensor: Tensor
) -> RemoteArray:
    """What an answer was too large to bring: kept until nothing refers to this any more."""
    array = RemoteArray(connection, drive, Kept(number, session, 0, -1, tensor), None)
    release = weakref.finalize(array, connection.leftovers.add, session, number)
    release.atexit = False
    return array


def brought(arrays: list[np.ndarray | RemoteArray]) -> Operation[list[np.ndarray]]:
    """All that an answer brought and left behind. What is fetched is let go of, and the list is empty then."""
    found = []
    arrays.reverse()
    while arrays:
        one = arrays.pop()
        found.append((yield from one._read(())) if isinstance(one, RemoteArray) else one)
    return found
