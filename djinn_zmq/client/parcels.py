"""How a request's tensors travel: inside it, beside it, in shared memory, or ahead of it.

up to 2 KiB      in the meta
from 64 KiB      in a slot of the client's own arena, where the server shares memory; what stands
                 in one already (`Checkpoint.writable`) is named, not copied
up to 1 MiB      as a buffer of the message
larger           uploaded first, in pieces of 1 MiB
"""

import time

import numpy as np

from djinn_zmq.client.calls import PIECE, Call, Operation
from djinn_zmq.client.connection import Connection
from djinn_zmq.memory.arena import Lease
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import INLINE_LIMIT, NAMES, SLOT_FROM, Frame, Tensor, inline


class Parcel:
    """What travels with one request, and comes back when it is answered.

    buffers: of the message. begin_ns: when the request was begun (perf_counter_ns).
    """

    # Most requests bring nothing: what is not there is not made either.
    buffers: tuple[bytes | memoryview, ...] = ()
    _leases: tuple[Lease, ...] = ()
    _uploads: tuple[int, ...] = ()

    def __init__(
        self, connection: Connection, session: int, timeout_s: float | None = None
    ) -> None:
        """timeout_s: for which an upload is waited for."""
        self.begin_ns = time.perf_counter_ns()
        self.session = session
        self._connection = connection
        self._timeout_s = timeout_s

    def place(self, array: np.ndarray) -> Operation[Tensor]:
        """Decide how *array* travels, and bring it there. Raises ArenaFull for no room, DeadlineExceeded."""
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        if array.nbytes <= INLINE_LIMIT:
            return inline(array)
        name = NAMES[array.dtype]
        standing = self._connection.sharing.slot_of(array)
        if standing is not None:
            return Tensor(name, array.shape, standing)
        raw = memoryview(array.reshape(-1).view(np.uint8))
        sharing = self._connection.sharing
        if sharing.lease is not None and array.nbytes >= SLOT_FROM:
            lease = sharing.stage(array.nbytes)
            self._leases += (lease,)
            np.frombuffer(lease.view, np.uint8)[:] = np.frombuffer(raw, np.uint8)
            return Tensor(name, array.shape, lease.slot)
        if array.nbytes <= PIECE:
            self.buffers += (raw,)
            return Tensor(name, array.shape, Frame(len(self.buffers) - 1))
        uploaded = yield Call(
            Op.UPLOAD,
            messages.Upload(array.nbytes),
            session=self.session,
            timeout_s=self._timeout_s,
            data=raw,
        )
        self._uploads += (uploaded.meta.id,)
        return Tensor(name, array.shape, uploaded.meta.tensor.where)

    def settle(self) -> None:
        """The request is answered, or never will be: what travelled with it comes back."""
        if not (self._leases or self._uploads) or self._connection.closed:
            return  # nothing did, or its memory went with the connection
        for lease in self._leases:
            self._connection.sharing.give_back(lease)
        for number in self._uploads:
            self._connection.leftovers.add(self.session, number)

    def drop(self) -> None:
        """As `settle`, of a request whose answer nobody takes any more: safe to call from a finalizer."""
        for lease in self._leases:
            self._connection.sharing.give_back_later(lease)
        for number in self._uploads:
            self._connection.leftovers.add(self.session, number)
