"""Bytes for peers that map no shared memory: pieces of kept tensors out, uploads in.

Neither passes through an engine. A READ is answered from the arena where the tensor lies; an upload
is copied once, from the socket into a leased slot that the engine then reads in place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        own = files.path_of(Path(state), record.kept.id)
        # Whose file it was made to share may have been released since; its own link may be still to come.
        other = files.path_of(Path(state), where.number)
        saved = files.read(own if own.exists() else other, where.mark)
        if (saved.hidden.dtype, saved.hidden.shape) != (tensor.dtype, tensor.shape):
            raise BadFile(f"{saved.path} holds {saved.hidden.dtype} {saved.hidden.shape}")
        # Of its pages only those are taken that are read to.
        whole = np.empty(tensor.shape, DTYPES[tensor.dtype])
    else:
        raise OnDevice("the checkpoint is on its device alone: prefetch it to the host first")
    chosen = Chosen.of(whole, selection(asked.at, tensor.shape))
    if not 0 <= asked.offset < chosen.nbytes:
        raise RequestError(f"offset {asked.offset} of a selection of {chosen.nbytes} bytes")
    end = min(asked.offset + asked.nbytes, chosen.nbytes)
    if saved is not None:
        touched = chosen.touched(whole, asked.offset, end - asked.offset)
        files.read_between(saved, saved.hidden, whole.reshape(-1).view(np.uint8).data, *touched)
    data = chosen.cut(asked.offset, end)
    if isinstance(where, Slot):
        arenas.recheck(where)
    piece = Tensor("uint8", (len(data),), Frame(0))
    return ReadReply(tensor.dtype, chosen.shape, piece), [data]


@dataclass(slots=True, eq=False)
class Chosen:
    """A selection that is copied a piece at a time: a view of the whole, and of one axis the places that a
    list chose, which as an index would copy all of it."""

    view: np.ndarray
    axis: int = -1
    places: np.ndarray | None = None  # int64

    @classmethod
    def of(cls, whole: np.ndarray, at: tuple[Any, ...]) -> "Chosen":
        """at: of `selection`, so with one list at most, which no slice parts from an int."""
        for place, part in enumerate(at):
            if isinstance(part, list):
                axis = sum(not isinstance(one, int) for one in at[:place])
                view = whole[(*at[:place], slice(None), *at[place + 1 :], ...)]
                return cls(view, axis, np.array(part, np.int64))
        return cls(whole[(*at, ...)])  # with "...": one number is a view, too

    @property
    def shape(self) -> tuple[int, ...]:
        extents = list(self.view.shape)
        if self.places is not None:
            extents[self.axis] = len(self.places)
        return tuple(extents)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.view.itemsize

    def cut(self, begin: int, end: int) -> bytes:
        """Bytes *begin* to *end* of it, in C order; nothing but the elements that have them is copied."""
        size = self.view.itemsize
        first, last = begin // size, -(-end // size)
        parts = [part.reshape(-1).view(np.uint8) for part in _runs(self, first, last)]
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return data[begin - first * size : end - first * size].tobytes()

    def row(self, number: int) -> "Chosen":
        if self.axis == 0 and self.places is not None:
            return Chosen(self.view[self.places[number], ...])
        return Chosen(self.view[number, ...], self.axis - 1, self.places)

    def rows(self, begin: int, end: int) -> np.ndarray:
        if self.places is None:
            return np.ascontiguousarray(self.view[begin:end])
        if self.axis == 0:
            return np.ascontiguousarray(self.view[self.places[begin:end]])
        between = (slice(None),) * (self.axis - 1)
        return np.ascontiguousarray(self.view[(slice(begin, end), *between, self.places)])

    def touched(self, whole: np.ndarray, offset: int, nbytes: int) -> tuple[int, int]:
        """Between which bytes of *whole* lie those from *offset* on of the selection."""
        view, item = self.view, whole.itemsize
        first, last = offset // item, (offset + nbytes - 1) // item
        # Steps are positive: these are the ends.
        at = np.array(np.unravel_index([first, last], self.shape or (1,)))
        if self.places is not None:  # a list's may be anywhere
            axis, places = self.axis, self.places
            if (at[:axis, 0] == at[:axis, 1]).all():
                places = places[at[axis, 0] : at[axis, 1] + 1]
            at[axis] = places.min(), places.max()
            at[axis + 1 :, 0] = 0
            at[axis + 1 :, 1] = np.array(view.shape[axis + 1 :]) - 1
        begin, end = np.dot(view.strides or (item,), at)
        start = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        return start + int(begin), start + int(end) + item


def _runs(chosen: Chosen, begin: int, end: int) -> Iterator[np.ndarray]:
    """Elements *begin* to *end* of *chosen*, in C order, as contiguous arrays: whole rows at once, and of the
    rows at both ends the part that is wanted."""
    if chosen.places is None and chosen.view.flags.c_contiguous:
        yield chosen.view.reshape(-1)[begin:end]
        return
    each = math.prod(chosen.shape[1:])
    while begin < end:
        number, inside = divmod(begin, each)
        whole_rows = end // each - number
        if inside == 0 and whole_rows:
            yield chosen.rows(number, number + whole_rows)
            begin += whole_rows * each
        else:
            stop = min(end - number * each, each)
            yield from _runs(chosen.row(number), inside, stop)
            begin = number * each + stop


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
