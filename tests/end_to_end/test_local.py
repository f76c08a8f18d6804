"""A private server: it serves one program, and goes with it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.errors import RequestError, StartError, UnknownModel
from tests.end_to_end.conftest import wait_gone
from tests.end_to_end.test_aio import quiet

FRANCE = "the capital of france is"


@pytest.fixture
def runtime(home, monkeypatch) -> Path:
    """Where the private servers of this process have their sockets."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    return home / "djinn"


def test_the_demo_does_the_main_job_on_a_local_server_that_is_gone_with_the_block(
    run, home, monkeypatch
):
    @contextmanager
    def local(*arguments: str, threads: int) -> Iterator[djinn.Model]:
        with djinn.local(*arguments, threads=threads) as model:
            options = Path(f"/proc/{model.server.welcome.pid}/cmdline").read_text().split("\0")
            assert f"--threads={threads}" in options
            pids.append(model.server.welcome.pid)
            assert model.run(FRANCE).top(1)[0].token == "paris"
            yield model
            pids.extend(one.pid for one in model.server.status().engines)

    pids: list[int] = []
    monkeypatch.setattr("djinn_zmq.cli.demo.local", local)
    status, said, complaint = run("demo")
    assert status == 0, (said, complaint)
    assert complaint == ""
    assert said.count("✓") >= 4 and "✗" not in said
    assert "paris" in said and "berlin" in said
    assert "all of it held, in " in said.splitlines()[-1]
    assert len(pids) == 2 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert os.listdir(home / "djinn") == []


def test_a_private_server_goes_with_its_program_also_when_that_is_killed(environment, home):
    program = (
        "import os, djinn_zmq as djinn\n"
        "def loading(_):\n"
        "    print('loading', flush=True)\n"
        "    os.read(0, 1)\n"
        "with djinn.local('tiny', progress=loading):\n"
        "    pass\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with started:
        try:
            assert started.stdout.readline() == b"loading\n"
            (socket,) = home.glob("djinn/local-*/djinn.sock")
            with djinn.connect(f"ipc://{socket}") as server:
                status = server.status()
            pids = [status.pid, status.engines[0].pid]
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        finally:
            started.kill()
    for pid in pids:
        wait_gone(pid)
    assert os.listdir(home / "djinn") == []


# ---- awaited


def test_an_awaited_local_serves_a_model_and_is_gone_with_the_block(runtime):
    async def main() -> None:
        async with aio.local("tiny", threads=1) as model:
            status = await model.server.status()
            options = Path(f"/proc/{status.pid}/cmdline").read_text().split("\0")
            assert "--threads=1" in options
            pids.extend([status.pid, *(engine.pid for engine in status.engines)])
            assert (await (await model.run(FRANCE)).top(1))[0].token == "paris"

    pids: list[int] = []
    quiet(main)
    assert len(pids) == 2 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert os.listdir(runtime) == []


def test_an_awaited_local_says_why_it_cannot_serve_and_leaves_nothing(runtime, monkeypatch):
    async def main() -> None:
        with pytest.raises(UnknownModel, match="nonsense"):
            async with aio.local("nonsense"):
                raise AssertionError("entered without a model")
        with pytest.raises(RequestError, match='dtype=\'int8\': "auto", "float32"'):
            async with aio.local("tiny", dtype="int8"):
                raise AssertionError("entered without a server")
        monkeypatch.setattr(aio, "check", lambda *_: None)  # the server finds out
        with pytest.raises(StartError, match="Invalid value for '--dtype'"):
            async with aio.local("tiny", dtype="int8"):
                raise AssertionError("entered without a server")

    quiet(main)
    assert os.listdir(runtime) == []


def children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(word) for word in (task / "children").read_text().split()}
    return found


def test_cancelling_local_while_its_server_starts_leaves_nothing(runtime):
    before = children()

    async def main() -> None:
        async def enter() -> None:
            async with aio.local("tiny"):
                raise AssertionError("entered though cancelled")

        entering = asyncio.create_task(enter())
        while not (runtime.exists() and list(runtime.glob("local-*")) and children() - before):
            await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert os.listdir(runtime) == []
        assert children() == before

    quiet(main)
