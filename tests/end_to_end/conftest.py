"""Real servers for real clients, and a count of what they leave behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import djinn_zmq as djinn
from djinn_zmq.errors import Unreachable
from tests.end_to_end import commands
from tests.end_to_end.strangers import Raw

ANSWER_S = 20.0
WAIT_S = 30.0
PAUSE_S = 0.005


@dataclass
class Running:
    """A server process of a test."""

    process: subprocess.Popen
    path: Path
    log: Path
    endpoints: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.path}"

    @property
    def tcp(self) -> str:
        return next(end for end in self.status().endpoints if end.startswith("tcp://"))

    def connect(self, **options) -> djinn.Server:
        return djinn.connect(self.endpoint, **options)

    def status(self):
        with self.connect() as server:
            return server.status()

    def engine_pid(self) -> int:
        return self.status().engines[0].pid

    def words(self) -> str:
        return self.log.read_text()

    def wait_answering(self) -> None:
        limit = time.monotonic() + ANSWER_S
        while True:
            try:
                self.connect(timeout_s=1.0).close()
                return
            except Unreachable:
                assert self.process.poll() is None, self.words()
                assert time.monotonic() < limit, self.words()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def wait_gone(pid: int) -> None:
    """Blocks until *pid* has ended."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            assert poll.poll(WAIT_S * 1000), f"process {pid} goes on"
        finally:
            os.close(handle)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Until *condition* holds, which asks a server. Between two looks, which are an exchange each, the
    CPU is for those who are to make it true."""
    limit = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < limit, f"not within {WAIT_S:g} s: {what}"
        time.sleep(PAUSE_S)
    return found


@contextmanager
def running(folder: Path, *options: str, port: int | str = 0) -> Iterator[Running]:
    """A server in *folder*; at the end it must go by itself and leave nothing there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, log = folder / "djinn.sock", folder.parent / f"{folder.name}.log"
    before = sorted(os.listdir("/dev/shm"))
    command = [sys.executable, "-m", "djinn_zmq.server", "--device=cpu", "--threads=1"]
    with log.open("wb") as words:
        process = subprocess.Popen(
            [*command, f"--port={port}", f"--ipc={path}", *options],
            stdout=words,
            stderr=words,
            stdin=subprocess.DEVNULL,
        )
    server = Running(process, path, log)
    try:
        server.wait_answering()
        yield server
        if process.poll() is None:
            engines = children_of(process.pid)
            status = server.end()
            assert status == 0, server.words()
            assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]
            assert sorted(os.listdir(folder)) == []
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert "Traceback" not in server.words(), server.words()
    assert sorted(os.listdir("/dev/shm")) == before


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory of mode 0700 whose path leaves room for the sockets' names (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="djinn-test-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def home(short_path) -> Path:
    """A user's runtime directory."""
    return short_path


@pytest.fixture
def environment(home, tmp_path) -> dict[str, str]:
    return commands.environment_of(home, tmp_path / "cache")


@pytest.fixture
def run(environment) -> Callable[..., tuple[int, str, str]]:
    return partial(commands.run, environment)


@pytest.fixture
def run_alone(environment) -> Callable[..., tuple[int, str, str]]:
    return partial(commands.run_alone, environment)


@pytest.fixture
def refused(run) -> Callable[..., str]:
    return lambda *arguments, **more: commands.one_sentence(run(*arguments, **more))


@pytest.fixture
def serve(tmp_path) -> Callable[..., object]:
    """Start servers with options of the test's choice: `with serve("--model=x") as server`."""
    count = iter(range(100))
    return lambda *options, **more: running(tmp_path / f"s{next(count)}", *options, **more)


@pytest.fixture
def raw() -> Iterator[Callable[..., Raw]]:
    """Connect by hand: `raw(endpoint, key)`."""
    with ExitStack() as stack:

        def connect(endpoint: str, key: Path | None = None) -> Raw:
            one = Raw(endpoint, key)
            stack.callback(one.close)
            return one

        yield connect


@pytest.fixture
def server(served) -> Iterator[djinn.Server]:
    with served.connect() as one:
        yield one


@pytest.fixture
def tiny(server) -> djinn.Model:
    return server.model("tiny")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
