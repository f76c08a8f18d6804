"""Pieces of selections: the bytes that numpy's own indexing gives, at the cost of the piece."""

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from djinn_zmq.errors import ArenaFull, BadFile, OnDevice, ProtocolError, RequestError, StaleSlot
from djinn_zmq.memory import files
from djinn_zmq.memory.arena import GRANULE, Pool
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.bulk import PIECE_LIMIT, Arriving, Chosen, begin, read
from djinn_zmq.server.registry import KeptRecord
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.edits import Pick, Rest, Stretch, Take, selection
from djinn_zmq.wire.messages import Chunk, Kept, Read, Upload
from djinn_zmq.wire.tensors import Device, File, Frame, Slot, Tensor

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


def test_a_file_that_holds_another_tensor_is_not_read(tmp_path: Path) -> None:
    whole = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    arrays = {"hidden": whole, "ids": np.zeros((1, 2), np.int64)}
    files.write(files.path_of(tmp_path, 8), arrays, {"format": files.FORMAT, "layer": "2"})
    for dtype, shape in (("float32", (1, 2, 5)), ("int32", (1, 2, 4))):
        kept = Kept(8, 1, 1, 2, Tensor(dtype, shape, File(8)))
        record = KeptRecord(kept, Tensor("int64", (1, 2), Frame(0)))
        with pytest.raises(BadFile, match=r"holds float32 \(1, 2, 4\)"):
            read(record, Read(8, (), 0, PIECE_LIMIT), cast(Arenas, None), str(tmp_path))


def test_a_whole_file_of_another_checkpoint_that_was_moved_there_is_not_read(
    tmp_path: Path,
) -> None:
    whole = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    arrays = {"hidden": whole, "ids": np.zeros((1, 2), np.int64)}
    facts = {"format": files.FORMAT, "layer": "2", files.MARK: "of another"}
    files.write(files.path_of(tmp_path, 8), arrays, facts)
    for mark, read_as in (("of another", whole.tobytes()), ("its own", None)):
        kept = Kept(8, 1, 1, 2, Tensor("float32", whole.shape, File(8, mark)))
        record = KeptRecord(kept, Tensor("int64", (1, 2), Frame(0)))
        with nullcontext() if read_as else pytest.raises(BadFile, match="another file than was"):
            _, (data,) = read(
                record, Read(8, (), 0, PIECE_LIMIT), cast(Arenas, None), str(tmp_path)
            )
            assert data == read_as


def test_a_file_that_is_cut_short_while_it_is_read_is_named_and_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.ones((1, 2, files.SUMMED), np.float32)
    arrays = {"ids": np.zeros((1, 2), np.int64), "hidden": whole}
    path = files.path_of(tmp_path, 8)
    files.write(path, arrays, {"format": files.FORMAT, "layer": "2"})
    kept = Kept(8, 1, 1, 2, Tensor("float32", whole.shape, File(8)))
    record = KeptRecord(kept, Tensor("int64", (1, 2), Frame(0)))
    check = files._check

    def cut(*args: Any) -> None:
        check(*args)
        os.truncate(path, 9 * files.SUMMED // 2)

    monkeypatch.setattr(files, "_check", cut)
    asked = Read(8, (), 4 * files.SUMMED, PIECE_LIMIT)
    with pytest.raises(BadFile, match=f"{path} is cut short: it ends at byte"):
        read(record, asked, cast(Arenas, None), str(tmp_path))


def test_a_piece_is_of_the_selection_and_no_larger_than_a_frame() -> None:
    record, arenas = in_a_slot(np.arange(MIB // 2, dtype=np.int32))
    for nbytes in (-1, 0, PIECE_LIMIT + 1):
        with pytest.raises(RequestError, match=f"a piece of {nbytes} bytes: 1 to {PIECE_LIMIT}"):
            read(record, Read(1, (), 0, nbytes), arenas, None)
    assert len(read(record, Read(1, (), 0, PIECE_LIMIT), arenas, None)[1][0]) == PIECE_LIMIT
    for offset in (-1, 2 * MIB):
        with pytest.raises(
            RequestError, match=f"offset {offset} of a selection of {2 * MIB} bytes"
        ):
            read(record, Read(1, (), offset, 1), arenas, None)
    assert len(read(record, Read(1, (), 2 * MIB - 1, PIECE_LIMIT), arenas, None)[1][0]) == 1


def in_a_slot(data: np.ndarray) -> tuple[KeptRecord, Arenas]:
    kept = Kept(1, 1, 1, 1, Tensor(data.dtype.name, data.shape, Slot(1, 0, 2)))
    return KeptRecord(kept, Tensor("int64", (1, 1), Frame(0))), cast(Arenas, OneSlot(data))


def test_what_a_slot_held_that_is_another_tensors_by_the_end_is_not_passed_on() -> None:
    class Reused(OneSlot):
        def recheck(self, slot: object) -> None:
            raise StaleSlot(f"{slot} is at another generation")

    whole = np.arange(8, dtype=np.int32)
    record, _ = in_a_slot(whole)
    with pytest.raises(StaleSlot):
        read(record, Read(1, (), 0, 32), cast(Arenas, Reused(whole)), None)


def test_what_is_on_its_device_alone_is_not_read() -> None:
    kept = Kept(1, 1, 1, 1, Tensor("int32", (8,), Device(1, 0, 2)))
    record = KeptRecord(kept, Tensor("int64", (1, 1), Frame(0)))
    with pytest.raises(OnDevice, match="prefetch it to the host first"):
        read(record, Read(1, (), 0, 32), cast(Arenas, None), None)


# ---- uploads


@pytest.fixture
def staging() -> Iterator[Pool]:
    pool = Pool(4 * GRANULE, GRANULE, lambda arena: 1, "staging")
    yield pool
    pool.close()


def upload(staging: Pool, nbytes: int) -> Arriving:
    settings = Settings(client_arenas=4 * GRANULE)
    return begin(codec.NOBODYS, Upload(nbytes), staging, settings)


def test_the_pieces_of_an_upload_are_put_together_in_its_slot(staging: Pool) -> None:
    data = os.urandom(5000)
    arriving = upload(staging, len(data))
    for offset, end, last in ((0, 1, False), (1, 4999, False), (4999, 5000, True)):
        assert arriving.take(Chunk(offset), [memoryview(data[offset:end])]) is last
    assert bytes(arriving.lease.view) == data
    assert staging.arenas[1].read(arriving.lease.slot, len(data)) == data


def test_a_piece_out_of_its_place_is_refused(staging: Pool) -> None:
    arriving = upload(staging, 10)
    arriving.take(Chunk(0), [memoryview(b"four")])
    for offset, sizes in (
        (0, (4,)),
        (3, (4,)),
        (5, (4,)),
        (4, (7,)),
        (4, (0,)),
        (4, ()),
        (4, (1, 1)),
    ):
        buffers = [memoryview(bytes(size)) for size in sizes]
        with pytest.raises(ProtocolError):
            arriving.take(Chunk(offset), buffers)
    assert arriving.take(Chunk(4), [memoryview(b" and 6")])
    assert bytes(arriving.lease.view) == b"four and 6"


def test_an_upload_is_of_something_and_fits_where_it_goes(staging: Pool) -> None:
    for nbytes in (-1, 0, 4 * GRANULE + 1):
        with pytest.raises(RequestError, match=f"an upload of {nbytes} bytes: 1 to {4 * GRANULE}"):
            upload(staging, nbytes)
    assert upload(staging, 4 * GRANULE).nbytes == staging.used
    with pytest.raises(ArenaFull):
        upload(staging, 1)
