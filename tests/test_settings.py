import dataclasses
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from djinn_zmq import settings
from djinn_zmq.errors import AccessDenied, RequestError
from djinn_zmq.settings import GIB, KIB, MIB, Settings, counted, format_bytes

LIMITED = {field.name for field in dataclasses.fields(Settings)} - {"state"}
NEEDED = LIMITED - set(settings.MAY_BE_ZERO)


@pytest.mark.parametrize(
    ("field", "value"),
    [*((one, 0) for one in sorted(NEEDED)), *((one, -1) for one in sorted(LIMITED))],
)
def test_a_limit_that_is_not_positive_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(RequestError, match=f"{field} is {value}: it must be positive"):
        Settings(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("spin_us", "a", "spin_us is 'a': it must be a whole number"),
        ("spin_us", math.nan, "spin_us is nan: it must be a whole number"),
        ("spin_us", None, "spin_us is None: it must be a whole number"),
        ("spin_us", True, "spin_us is True: it must be a whole number"),
        ("spin_us", 2**70, f"spin_us is {2**70}: at most 1000000"),
        ("grace_s", math.nan, "grace_s is nan: it must be a number"),
        ("grace_s", math.inf, "grace_s is inf: at most 604800"),
        ("threads", 1.5, "threads is 1.5: it must be a whole number"),
    ],
)
def test_a_limit_that_is_no_number_or_past_all_reason_is_refused_by_name(
    field: str, value: object, words: str
) -> None:
    with pytest.raises(RequestError) as refused:
        Settings(**{field: value})  # type: ignore[arg-type]
    assert str(refused.value) == words


def test_numpys_numbers_are_numbers() -> None:
    assert Settings(spin_us=np.int64(50), grace_s=np.float32(2)).spin_us == 50  # type: ignore[arg-type]


def test_an_arena_is_cut_from_whole_pieces() -> None:
    with pytest.raises(RequestError, match="a multiple of 64 KiB"):
        Settings(arena=MIB + 1)
    assert Settings(arena=128 * KIB).arena == 128 * KIB


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().arena = 1  # type: ignore[misc]


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_the_runtime_directory_is_its_users_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = os.umask(mask)
    try:
        path = settings.runtime_dir()
    finally:
        os.umask(before)
    assert path == tmp_path / "djinn"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert settings.runtime_dir() == path


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    closed, other = (
        f": run 'chmod 700 {tmp_path}'$",
        f": name one of its own, {tmp_path}/djinn say$",
    )
    # What all may write in, as /tmp, is used by others: it is not to be closed to them.
    for mode, mend in ((0o755, closed), (0o710, closed), (0o701, closed), (0o1777, other)):
        tmp_path.chmod(mode)
        with pytest.raises(AccessDenied, match=f"with mode {mode:04o}.*{mend}"):
            settings.private_dir(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "file", "dangling", "file/below"):
        with pytest.raises(
            AccessDenied, match=f"{tmp_path / name} (is no|cannot be made a) directory"
        ):
            settings.private_dir(tmp_path / name)
    with pytest.raises(
        AccessDenied, match="^/dev/null is no directory: name one, or one to be made$"
    ):
        settings.private_dir(Path("/dev/null"))


def test_a_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    settings.private_dir(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(AccessDenied, match="must be a directory of uid 12345"):
        settings.private_dir(tmp_path)


def test_a_socket_path_leaves_room_for_the_names_made_from_it() -> None:
    longest = "/" + "x" * (107 - len(".lease") - 1)
    assert settings.socket_path(longest) == Path(longest)
    with pytest.raises(RequestError, match="with its suffixes 108 bytes, at most 107 fit"):
        settings.socket_path(longest + "x")
    with pytest.raises(RequestError, match="too long"):
        settings.socket_path("/" + "é" * 60)


def test_the_endpoint_is_the_environments_or_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    monkeypatch.setattr(settings, "private_dir", lambda path: path)
    monkeypatch.delenv("DJINN_ENDPOINT", raising=False)
    assert settings.default_endpoint() == "ipc:///tmp/djinn/djinn.sock"
    monkeypatch.setenv("DJINN_ENDPOINT", "tcp://elsewhere:5556")
    assert settings.default_endpoint() == "tcp://elsewhere:5556"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert settings.runtime_dir() == Path(f"/tmp/djinn-{os.getuid()}")


def test_the_cache_is_the_environments_or_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJINN_CACHE", "/a")
    assert settings.models_dir() == Path("/a/models")
    monkeypatch.delenv("DJINN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert settings.cache_dir() == Path("/b/djinn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings.cache_dir() == Path.home() / ".cache" / "djinn"


@pytest.mark.parametrize(
    "nbytes, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (10_560_000, "10.1 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (1 << 50, "1048576.0 GiB"),
    ],
)
def test_bytes_are_written_with_their_unit(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_one_is_counted_without_an_s_and_none_with_it() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert [counted(n, "branch") for n in (1, 2)] == ["1 branch", "2 branches"]
