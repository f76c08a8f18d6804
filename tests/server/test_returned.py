"""What a server finds in its state directory, and to whom it gives it back."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from djinn_zmq.errors import AddressInUse, BadFile, StartError, UnknownCheckpoint
from djinn_zmq.memory import files
from djinn_zmq.server.registry import Session
from djinn_zmq.server.returned import Returned
from djinn_zmq.wire.messages import ModelInfo

TINY = ModelInfo("tiny", "tiny", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")
HUGE = replace(TINY, name="huge", num_layers=9)
ME = "uid:7"
ARRAYS = {"hidden": np.ones((1, 2, 4), np.float32), "ids": np.ones((1, 2), np.int64)}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    return folder


def write(path: Path, owner: str = ME, **more: str) -> int:
    facts = {"format": files.FORMAT, "owner": owner, "layer": "1", **files.facts_of(TINY)}
    return files.write(path, ARRAYS, facts | more)


def mine(owner: str = ME) -> Session:
    return Session(5, owner, "tiny", 0, None)


def test_each_is_listed_for_its_owner_and_its_model_and_claimed_once_and_all_or_none(
    state: Path,
) -> None:
    nbytes = write(files.path_of(state, 1))
    os.link(files.path_of(state, 1), files.path_of(state, 2))  # two of the same bytes
    write(files.path_of(state, 3), owner="uid:8")
    returned = Returned(str(state))
    assert len(returned) == 3 and returned.nbytes == 2 * nbytes
    assert [one.id for one in returned.of(ME, TINY)] == [1, 2]
    assert not returned.of(ME, HUGE) and [one.id for one in returned.of("uid:8", TINY)] == [3]
    for numbers, info, error in (
        ((1, 3), TINY, UnknownCheckpoint),
        ((1, 4), TINY, UnknownCheckpoint),
        ((1, 2), HUGE, BadFile),
    ):
        with pytest.raises(error):
            returned.claim(numbers, mine(), info)
    assert len(returned) == 3
    (record,) = returned.claim((1, 1), mine(), TINY)
    assert (record.kept.id, record.kept.session, record.kept.layer) == (1, 5, 1)
    assert [one.id for one in returned.of(ME, TINY)] == [2]
    with pytest.raises(UnknownCheckpoint):
        returned.claim((1,), mine(), TINY)
    returned.close()


def test_a_directory_is_one_servers_until_that_lets_go_of_it(state: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first = Returned(str(state))
    with pytest.raises(AddressInUse, match="already keeps checkpoints in"):
        Returned(str(state))
    first.close()
    Returned(str(state)).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_without_hard_links_is_refused_and_left_as_it_was(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched, pytest.raises(StartError, match="has hard links"):
        patched.setattr(os, "link", link)
        Returned(str(state))
    assert not list(state.iterdir())
    Returned(str(state)).close()  # nor is it held by who refused it


def test_a_directory_that_can_only_be_read_is_refused_with_the_reason(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("touch", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(StartError, match="Read-only file system. Choose a directory with --state"):
        Returned(str(state))


def test_what_nobody_can_go_on_from_is_removed_and_what_is_not_the_servers_own_stays(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(files.path_of(state, 1), needs="3 tokens' keys and values")
    write(files.path_of(state, 2), owner="tcp:4711")
    (state / ".half.tmp").write_bytes(b"half")
    for name in ("beef", "beef.safetensors", "-1.safetensors"):  # a user's own, of such a name
        write(state / name, needs="3 tokens' keys and values")
    for number in (0, -1, 1 << 63, 1 << 64):  # none of these fits a message, or is one
        write(files.path_of(state, number))
    write(state / "3.safetensors")
    (state / "notes.tmp").write_bytes(b"a user's")
    files.write(
        files.path_of(state, 4),
        ARRAYS,
        {"format": files.FORMAT, "layer": "1"} | files.facts_of(TINY),
    )
    (state / ".folder.tmp").mkdir()
    before = len(list(state.iterdir()))
    returned = Returned(str(state))
    assert not len(returned)  # no engine would find them
    assert len(list(state.iterdir())) == before - 3
    assert not files.path_of(state, 1).exists() and not files.path_of(state, 2).exists()
    assert not (state / ".half.tmp").exists()
    returned.close()
    said = [one.getMessage() for one in caplog.records if "left alone" in one.getMessage()]
    assert len(said) == 11
    for name, why in (
        ("notes.tmp", "its name is none that a server gives"),
        (files.path_of(state, 4).name, "it names no owner"),
    ):
        assert f"{name} in the state directory is left alone: {why}" in said
