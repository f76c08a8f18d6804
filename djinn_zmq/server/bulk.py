"""Bytes for peers that map no shared memory: pieces of kept tensors out, uploads in.

Neither passes through an engine. A READ is answered from the arena where the tensor lies; an upload
is copied once, from the socket into a leased slot that the engine then reads in place.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from djinn_zmq.errors import BadFile, OnDevice, ProtocolError, RequestError
from djinn_zmq.memory import files
from djinn_zmq.memory.arena import Lease, Pool
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.registry import KeptRecord
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.edits import selection
from djinn_zmq.wire.messages import Chunk, Read, ReadReply, Upload
from djinn_zmq.wire.tensors import DTYPES, File, Frame, Slot, Tensor, over

PIECE_LIMIT = 1 * MIB


def read(
    record: KeptRecord, asked: Read, arenas: Arenas, state: str | None
) -> tuple[ReadReply, list[bytes]]:
    """A piece of a kept tensor's selection, copied out of its slot or its file."""
    tensor = record.kept.tensor
    if not 0 < asked.nbytes <= PIECE_LIMIT:
        raise RequestError(f"a piece of {asked.nbytes} bytes: 1 to {PIECE_LIMIT}")
    where, saved = tensor.where, None
    if isinstance(where, Slot):
        whole = over(arenas.view(where, tensor.nbytes), tensor.dtype, tensor.shape)
    elif isinstance(where, File) and state is not None:
        saved = files.read(files.path_of(Path(state), where.number))
        whole = files.mapped(saved, saved.hidden)
        if whole.shape != tensor.shape or whole.dtype != DTYPES[tensor.dtype]:
            raise BadFile(f"{saved.path} holds {whole.dtype} {whole.shape}")
    else:
        raise OnDevice("the checkpoint is on its device alone: prefetch it to the host first")
    # With "...": one number is a view, too.
    chosen = whole[(*selection(asked.at, tensor.shape), ...)]
    flat = np.ascontiguousarray(chosen).reshape(-1).view(np.uint8)
    if not 0 <= asked.offset < flat.size:
        raise RequestError(f"offset {asked.offset} of a selection of {flat.size} bytes")
    data = flat[asked.offset : asked.offset + asked.nbytes].tobytes()
    if isinstance(where, Slot):
        arenas.recheck(where)
    elif saved is not None:
        files.check(saved, saved.hidden, whole, *_touched(whole, chosen, asked.offset, len(data)))
    piece = Tensor("uint8", (len(data),), Frame(0))
    return ReadReply(tensor.dtype, chosen.shape, piece), [data]


def _touched(whole: np.ndarray, chosen: np.ndarray, offset: int, nbytes: int) -> tuple[int, int]:
    """Between which bytes of *whole* lie those from *offset* on of *chosen*, a selection of it."""
    if not np.may_share_memory(whole, chosen):  # a list's selection is a copy: of anything
        return 0, whole.nbytes
    first, last = offset // whole.itemsize, (offset + nbytes - 1) // whole.itemsize
    # Steps are positive: these are the ends.
    at = np.unravel_index([first, last], chosen.shape or (1,))
    begin, end = np.dot(chosen.strides or (whole.itemsize,), at)
    start = chosen.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return start + int(begin), start + int(end) + whole.itemsize


@dataclass(slots=True, eq=False)
class Arriving:
    """An upload under way. Pieces come in order; a refused one is answered once, then ignored."""

    header: Header
    lease: Lease
    nbytes: int
    received: int = 0

    def take(self, chunk: Chunk, buffers: list[memoryview]) -> bool:
        """Copy one piece to its place. True when it was the last one."""
        if len(buffers) != 1:
            raise ProtocolError(f"a chunk with {len(buffers)} buffers: it has one")
        size = len(buffers[0])
        if chunk.offset != self.received or size == 0 or chunk.offset + size > self.nbytes:
            raise ProtocolError(
                f"chunk of {size} bytes at {chunk.offset}: {self.received} of {self.nbytes} "
                "bytes have come"
            )
        self.lease.view[chunk.offset : chunk.offset + size] = buffers[0]
        self.received += size
        return self.received == self.nbytes


def begin(header: Header, asked: Upload, staging: Pool, settings: Settings) -> Arriving:
    """A slot for an upload. Raises RequestError for a size it cannot have, ArenaFull for no room."""
    if not 0 < asked.nbytes <= settings.client_arenas:
        raise RequestError(f"an upload of {asked.nbytes} bytes: 1 to {settings.client_arenas}")
    lease = staging.lease(asked.nbytes, header.session)
    return Arriving(header, lease, asked.nbytes)
