"""The disk tier's threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from djinn_zmq.engine.disk import Disk
from djinn_zmq.memory.files import FORMAT, path_of
from djinn_zmq.settings import KIB

IDS = np.arange(2, dtype=np.int64).reshape(1, 2)


def test_a_thread_that_reads_or_writes_a_file_is_known_of_until_it_is_through(
    tmp_path: Path,
) -> None:
    woken = threading.Semaphore(0)
    disk = Disk(tmp_path, 1024 * KIB, woken.release)
    assert not disk.busy
    data = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    target = memoryview(bytearray(data.nbytes))
    facts = {"format": FORMAT, "layer": "2"}
    for begin in (
        lambda: disk.save([7], {"hidden": data, "ids": IDS}, facts),
        lambda: disk.load(7, target),
    ):
        with disk_held(disk) as let_go:
            future = begin()
            assert disk.busy
            let_go()
            future.result()
        assert woken.acquire(timeout=10) and not disk.busy
    assert bytes(target) == data.tobytes()
    disk.close()


def test_a_file_is_there_under_all_of_its_numbers_or_none(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 1024 * KIB, lambda: None)
    arrays = {"hidden": np.zeros((1, 2, 4), np.float32), "ids": IDS}
    taken = path_of(tmp_path, 9)
    taken.write_bytes(b"another's")
    future = disk.save([7, 8, 9], arrays, {"format": FORMAT, "layer": "2"})
    assert isinstance(future.exception(10), FileExistsError)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another's"]
    taken.unlink()
    disk.save([7, 8, 9], arrays, {"format": FORMAT, "layer": "2"}).result(10)
    assert sorted(tmp_path.iterdir()) == [path_of(tmp_path, number) for number in (7, 8, 9)]
    disk.close()


@contextmanager
def disk_held(disk: Disk) -> Iterator[Callable[[], None]]:
    """Its threads do nothing until they are let go."""
    gate = threading.Event()
    for thread in (disk._writer, disk._reader):
        thread.submit(gate.wait, 10)
    try:
        yield gate.set
    finally:
        gate.set()
