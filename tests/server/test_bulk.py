"""Pieces of selections: the bytes that numpy's own indexing gives, at the cost of the piece."""

import tracemalloc
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from djinn_zmq.memory import files
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.bulk import PIECE_LIMIT, Chosen, read
from djinn_zmq.server.registry import KeptRecord
from djinn_zmq.settings import MIB
from djinn_zmq.wire.edits import Pick, Rest, Stretch, Take, selection
from djinn_zmq.wire.messages import Kept, Read
from djinn_zmq.wire.tensors import File, Frame, Slot, Tensor

ALL = Stretch(None, None, None)
INDICES = {
    "all": (),
    "one row": (Pick(1),),
    "one number": (Pick(1), Pick(-2), Pick(3)),
    "every second position": (ALL, Stretch(None, None, 2)),
    "every third number": (Rest(), Stretch(1, None, 3)),
    "both": (ALL, Stretch(1, -1, 2), Stretch(None, None, 5)),
    "a list of rows": (Take((3, 0, 3)),),
    "a list of positions": (ALL, Take((6, 0, 2, 5))),
    "a list of numbers": (ALL, Stretch(None, None, 2), Take((10, 3, 3, 0))),
    "an int and a list": (Pick(2), Take((6, 0, 2))),
    "a list and an int": (ALL, Take((6, 0, 2)), Pick(4)),
    "backwards": (ALL, Stretch(None, None, -1)),
    "backwards at last": (Rest(), Stretch(None, None, -3)),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_piece_of_a_selection_holds_the_bytes_of_numpys_own(name: str) -> None:
    whole = np.arange(4 * 7 * 11, dtype=np.int16).reshape(4, 7, 11)
    at = selection(INDICES[name], whole.shape)
    expected = np.array(whole[at], order="C")
    chosen = Chosen.of(whole, at)
    assert (chosen.shape, chosen.nbytes) == (expected.shape, expected.nbytes)
    data = expected.tobytes()
    for nbytes in (1, 3, 16, 44, len(data)):
        for offset in range(0, len(data), max(1, nbytes // 3)):
            end = min(offset + nbytes, len(data))
            assert chosen.cut(offset, end) == data[offset:end]
            # What is held against checksums has all of it.
            begin, stop = chosen.touched(whole, offset, end - offset)
            places = np.arange(whole.nbytes).reshape(*whole.shape, 2)[at].reshape(-1)[offset:end]
            assert begin <= places.min() <= places.max() < stop <= whole.nbytes


class OneSlot:
    """An arena of one slot, as the server sees it."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def view(self, *_: object) -> memoryview:
        return memoryview(self._data.reshape(-1).view(np.uint8))

    def recheck(self, *_: object) -> None: ...


@pytest.mark.parametrize("name", ["every second position", "backwards"])
def test_a_piece_of_a_large_selection_costs_what_it_reads(name: str) -> None:
    whole = np.arange(4 * 2048 * 1024, dtype=np.float32).reshape(4, 2048, 1024)  # 32 MiB
    ids = Tensor("int64", (1, 1), Frame(0))
    kept = Kept(1, 1, 1, 1, Tensor("float32", whole.shape, Slot(1, 0, 2)))
    record, arenas = KeptRecord(kept, ids), cast(Arenas, OneSlot(whole))
    expected = np.ascontiguousarray(whole[selection(INDICES[name], whole.shape)])
    for offset in (0, 7 * MIB + 12, expected.nbytes - 100):
        tracemalloc.start()
        try:
            reply, (data,) = read(record, Read(1, INDICES[name], offset, PIECE_LIMIT), arenas, None)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert data == expected.reshape(-1).view(np.uint8)[offset:][:PIECE_LIMIT].tobytes()
        assert (reply.dtype, reply.shape) == ("float32", expected.shape)
        assert most < 6 * PIECE_LIMIT


@pytest.mark.parametrize("number", [7, 8])
def test_a_checkpoint_is_read_from_a_file_of_its_own_or_the_one_that_it_shares(
    tmp_path: Path, number: int
) -> None:
    """Whose file it shares may be released, and then has none; its own link may not be there yet."""
    whole = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    arrays = {"hidden": whole, "ids": np.zeros((1, 2), np.int64)}
    files.write(files.path_of(tmp_path, number), arrays, {"format": files.FORMAT, "layer": "2"})
    kept = Kept(8, 1, 1, 2, Tensor("float32", whole.shape, File(7)))
    record = KeptRecord(kept, Tensor("int64", (1, 2), Frame(0)))
    _, (data,) = read(record, Read(8, (), 0, PIECE_LIMIT), cast(Arenas, None), str(tmp_path))
    assert data == whole.tobytes()
