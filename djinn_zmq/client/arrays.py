"""Arrays that stay on the server until somebody looks at them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from djinn_zmq.client.connection import PIECE, Call, Connection, Operation
from djinn_zmq.client.indexing import index_of
from djinn_zmq.errors import Lost, StaleSlot
from djinn_zmq.wire.edits import Index, selection
from djinn_zmq.wire.messages import Kept, Read
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import DTYPES, Slot, over

Drive = Callable[[Operation[Any]], Any]


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
        array = self.fetch()
        if not isinstance(array, np.ndarray):
            array.close()
            raise TypeError("in asyncio code use `await array.fetch()` in np.asarray's place")
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self.dtype} array of shape {self.shape}, on the server>"

    def _read(self, index: Index) -> Operation[np.ndarray]:
        chosen = selection(index, self.shape, "the array")
        if self._connection.sharing.can_map(self._kept.tensor):
            return self._read_slot(chosen)
        return (yield from self._pull(index))

    def _read_slot(self, chosen: tuple[Any, ...]) -> np.ndarray:
        """Copied out of the shared slot; nobody is asked."""
        tensor = self._kept.tensor
        assert isinstance(tensor.where, Slot)
        arena = self._connection.sharing.arena(tensor.where.arena)
        try:
            whole = over(arena.view(tensor.where, tensor.nbytes), tensor.dtype, tensor.shape)
            part = np.array(whole[chosen])
            arena.check(tensor.where)
        except StaleSlot as exc:
            raise Lost(f"{self!r} is no more: it was released") from exc
        return part

    def _pull(self, index: Index) -> Operation[np.ndarray]:
        """Pieces over the bus, several asked for at once."""
        first = yield self._piece(index, 0)
        meta = first.meta
        pieces = [first]
        shape = tuple(meta.shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        if nbytes > PIECE:
            pieces += yield [self._piece(index, offset) for offset in range(PIECE, nbytes, PIECE)]
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
