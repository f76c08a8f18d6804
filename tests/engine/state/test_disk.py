"""The disk tier's threads."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from djinn_zmq.engine.state.disk import Disk
from djinn_zmq.errors import BadFile
from djinn_zmq.memory import files
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


def test_a_file_that_may_not_be_on_the_disk_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be found there by the next server, and counted by nobody until then."""
    disk = Disk(tmp_path, 1024 * KIB, lambda: None)
    arrays = {"hidden": np.zeros((1, 2, 4), np.float32), "ids": IDS}
    monkeypatch.setattr(files, "_sync_folder", refused)
    future = disk.save([7, 8], arrays, {"format": FORMAT, "layer": "2"})
    assert isinstance(future.exception(10), OSError)
    assert not list(tmp_path.iterdir())
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


def test_a_file_that_has_lost_its_number_is_the_others_whether_they_could_be_linked_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that has no hard links, or for a file that has too many."""
    disk = Disk(tmp_path, 1024 * KIB, lambda: None)
    arrays = {"hidden": np.zeros((1, 2, 4), np.float32), "ids": IDS}
    disk.save([7], arrays, {"format": FORMAT, "layer": "2"}).result(10)
    data = path_of(tmp_path, 7).read_bytes()
    disk.link(7, 8)
    with monkeypatch.context() as patch, disk_held(disk) as let_go:
        patch.setattr(os, "link", refused)
        disk.link(7, 9)
        disk.remove(7, 8)
        let_go()
        wait_for(disk)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [data]
    disk.remove(8, 9)
    wait_for(disk)
    assert path_of(tmp_path, 9).read_bytes() == data
    disk.remove(9)
    disk.remove(9)  # there is none: nothing happens
    disk.close()
    assert not list(tmp_path.iterdir())


def test_a_link_of_its_own_stays_though_another_file_was_moved_to_the_number_that_ends(
    tmp_path: Path,
) -> None:
    disk = Disk(tmp_path, 1024 * KIB, lambda: None)
    arrays = {"hidden": np.zeros((1, 2, 4), np.float32), "ids": IDS}
    disk.save([7, 8], arrays, {"format": FORMAT, "layer": "2"}).result(10)
    data = path_of(tmp_path, 8).read_bytes()
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"another's")
    foreign.replace(path_of(tmp_path, 7))
    disk.remove(7, 8)
    wait_for(disk)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [data]
    disk.close()


@pytest.mark.parametrize("inherits", [False, True])
def test_a_file_is_read_when_it_has_the_number_that_it_is_read_under(
    tmp_path: Path, inherits: bool
) -> None:
    """It may get that behind a large one that is being written."""
    disk, gate = Disk(tmp_path, 1024 * KIB, lambda: None), threading.Event()
    data = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    disk.save([7], {"hidden": data, "ids": IDS}, {"format": FORMAT, "layer": "2"}).result(10)
    disk._writer.submit(gate.wait, 10)
    if inherits:
        disk.remove(7, 8)
    else:
        disk.link(7, 8)
    target = memoryview(bytearray(data.nbytes))
    future = disk.load(8, target)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    gate.set()
    future.result(10)
    assert bytes(target) == data.tobytes()
    disk.close()


def refused(*_: Any) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def wait_for(disk: Disk) -> None:
    """Until its writer has done all that it was told."""
    disk._writer.submit(lambda: None).result(10)


def test_what_is_counted_and_what_is_others_leaves_that_much_less_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 100, lambda: None)
    assert (disk.used, disk.unclaimed) == (0, 0)
    assert disk.fits(100) and not disk.fits(101)
    assert "100 B free, limit 100 B:" in str(disk.full(200))
    disk.used, disk.unclaimed = 50, 20
    assert disk.fits(30) and not disk.fits(31)
    assert "30 B free, limit 100 B, 20 B of it with what model.returned() lists" in str(
        disk.full(200)
    )
    disk.used = 200
    assert "200 B of disk asked, 0 B free" in str(disk.full(200))
    disk.close()
    nowhere = Disk(None, 100, lambda: None)
    assert not nowhere.fits(0) and nowhere.limit == 0
    nowhere.close()


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 1024 * KIB, lambda: None)
    data = np.zeros((1, 2, 4), np.float32)
    disk.save([7], {"hidden": data, "ids": IDS}, {"format": FORMAT, "layer": "2"}).result(10)
    for nbytes in (data.nbytes - 1, data.nbytes + 1):
        future = disk.load(7, memoryview(bytearray(nbytes)))
        with pytest.raises(BadFile, match=f"{data.nbytes} bytes of hidden, not {nbytes}"):
            future.result(10)
    disk.close()


def test_who_closes_waits_for_what_is_under_way(tmp_path: Path) -> None:
    disk, done = Disk(tmp_path, 1024 * KIB, lambda: None), []
    for thread in (disk._writer, disk._reader):
        thread.submit(lambda: (time.sleep(0.01), done.append(True)))
    disk.close()
    assert len(done) == 2
