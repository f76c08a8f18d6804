"""A server that is started: it serves as it was told to, and ends leaving nothing."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.errors import DjinnError, Lost, ModelRefused, RequestError, UnknownModel, Unreachable
from djinn_zmq.settings import Settings
from tests.end_to_end.commands import Started, environment_of
from tests.end_to_end.conftest import free_port, wait_gone

FRANCE = "the capital of france is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"
HAS_GPU = Path("/proc/driver/nvidia/version").exists()


@pytest.fixture
def start(environment) -> Iterator:
    """Start `python -m djinn_zmq.server` with options; ended with the test, whatever it is at."""
    with contextlib.ExitStack() as stack:

        def start(*options, **more) -> Started:
            arguments = ["-m", "djinn_zmq.server", "--threads=1", *map(str, options)]
            started = Started(arguments, environment, **more)
            stack.callback(started.close)
            return started

        yield start


def engine_of(endpoint: str) -> int:
    with djinn.connect(endpoint) as server:
        return server.status().engines[0].pid


# ---- as it was told


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lamma"}))


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (broken_json, "config.json"),
        (no_weights, "model.safetensors"),
        (unknown_architecture, "lamma"),
    ],
)
def test_a_broken_model_directory_is_refused_with_the_reason_and_others_are_served(
    served, server, tmp_path, breaking, reason
):
    folder = tmp_path / "a: b"  # what a message says of it starts with "NAME: " too
    shutil.copytree(TINY, folder)
    breaking(folder)
    for _ in range(2):  # it is tried again each time: the user may have mended it
        with pytest.raises((UnknownModel, ModelRefused), match=reason) as refused:
            server.model(folder)
        assert str(folder) in str(refused.value)
    shutil.rmtree(folder)
    shutil.copytree(TINY, folder)
    mended = server.model(folder)
    assert mended.run(FRANCE).logits.tobytes() == server.model("tiny").run(FRANCE).logits.tobytes()
    mended.close()


class Odd(NamedTuple):
    """A server in a terminal of its own, with float32 and a broken model, told to serve on a GPU where there
    is none."""

    started: Started
    home: Path  # the runtime directory
    port: int
    broken: Path

    @property
    def ipc(self) -> str:
        return f"ipc://{self.home}/djinn/djinn.sock"


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Iterator[Odd]:
    folder, port = tmp_path_factory.mktemp("odd"), free_port()
    shutil.copytree(TINY, folder / "broken")
    broken_json(folder / "broken")
    options = [f"--port={port}", "--dtype=float32", "--threads=1", "--spin-us=200"]
    options.append(f"--model={folder / 'broken'}")
    with tempfile.TemporaryDirectory(prefix="djinn-test-", dir="/tmp") as home:
        started = Started(
            ["-m", "djinn_zmq.server", *options, *([] if HAS_GPU else ["--gpu=0"])],
            environment_of(Path(home), folder / "cache"),
            terminal=True,
        )
        try:
            started.wait_for("djinn: serving at")
            yield Odd(started, Path(home), port, folder / "broken")
        finally:
            started.close()


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_server_says_so_and_answers_before_a_model_is_loaded(odd):
    ipc, tcp = odd.ipc, f"tcp://127.0.0.1:{odd.port}"
    with djinn.connect(ipc) as here, djinn.connect(tcp) as there:
        assert (here.ping(), there.ping()) == ("serving", "serving")
        status = here.status()
        assert status.engines[0].state in ("starting", "loading")
        assert status.models == ()
        assert status.endpoints == (ipc, tcp)
        assert status.pid == odd.started.process.pid
        for server in (here, there):  # both wait for the model, and get it
            assert server.model("tiny").run(FRANCE).top(1)[0].token == "paris"
        engine = here.status().engines[0]
        assert (engine.state, engine.device) == ("ready", "cpu")
    said = "djinn: no NVIDIA GPU on this machine (--gpu 0): serving on the CPU"
    assert said in odd.started.words


def test_a_server_started_with_a_broken_model_answers_and_gives_the_reason(odd):
    with djinn.connect(odd.ipc) as server:
        assert server.ping() == "serving"
        with pytest.raises(DjinnError, match=r"config\.json"):
            server.model(odd.broken)
        assert server.model("tiny").run(FRANCE).top(1)[0].token == "paris"
        assert [model.name for model in server.status().models] == ["tiny"]


def test_dtype_float32_serves_float32_whatever_is_stored(odd, tiny, run):
    stored = tiny.run(FRANCE, stop_at=2).checkpoint.hidden.fetch()
    assert stored.dtype == ml_dtypes.bfloat16
    with djinn.connect(odd.ipc) as server:
        model = server.model("tiny")
        assert (model.dtype, model.info.nbytes) == ("float32", 2 * tiny.info.nbytes)
        point = model.run(FRANCE, stop_at=2).checkpoint
        assert point.dtype == point.hidden.fetch().dtype == np.float32
        assert point.nbytes == 2 * stored.nbytes
        near = np.abs(point.hidden.fetch() - stored.astype(np.float32)).max()
        assert 0 < near < 0.1 * np.abs(stored.astype(np.float32)).max()
        done = point.resume()
        assert done.logits.dtype == np.float32 and done.top(1)[0].token == "paris"
        assert done.logits.tobytes() == model.run(FRANCE).logits.tobytes()
        assert "float32" in run("ps", "--server", odd.ipc)[1]


def test_spinning_ends_answer_as_sleeping_ones_do(odd):
    with (
        djinn.connect(odd.ipc, spin_us=200) as server,
        djinn.connect(odd.ipc, lane=False) as bus,
    ):
        model = server.model("tiny")
        for _ in range(200):
            assert model.ping() == "idle"
            assert bus.model("tiny").ping() == "idle"
        assert model.run(FRANCE).top(1)[0].token == "paris"
    with pytest.raises(RequestError, match="spin_us is -1"):
        Settings(spin_us=-1)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_the_ipv6_loopback_is_served_without_keys(start):
    port = free_port()
    started = start("--port", port, "--host", "::1")
    started.wait_for("djinn: serving at")
    with djinn.connect(f"tcp://[::1]:{port}") as server:
        assert server.ping() == "serving"
    assert started.end() == 0


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_any_loopback_address_is_served_without_keys(start, host):
    port = free_port()
    started = start("--port", port, "--host", host)
    started.wait_for("djinn: serving at")
    with djinn.connect(f"tcp://{host}:{port}") as server:
        assert server.ping() == "serving"
    assert started.end() == 0


# ---- ending


def test_stop_ends_the_server_and_its_engine_and_leaves_nothing(start, run, run_alone, home):
    started = start("--port", free_port())
    started.wait_for("djinn: serving at")
    endpoint = f"ipc://{home}/djinn/djinn.sock"
    with djinn.connect(endpoint) as server:
        engine = engine_of(endpoint)
        code, said, complaint = run_alone("stop")
        assert (code, said, complaint) == (
            0,
            f"stopped the server with pid {started.process.pid}\n",
            "",
        )
        with pytest.raises(Lost):
            server.ping()
    assert started.wait() == 0
    assert started.words.endswith("djinn: stopped\n")
    wait_gone(engine)
    assert os.listdir(home / "djinn") == []
    assert run("ps")[0] == 1


def test_the_files_of_a_killed_server_are_taken_over_by_the_next(start, home):
    endpoint = f"ipc://{home}/djinn/djinn.sock"
    first = start("--port", 0)
    first.wait_for("djinn: serving at")
    engine = engine_of(endpoint)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    wait_gone(engine)
    stale = sorted(os.listdir(home / "djinn"))
    assert stale[0] == "djinn.sock"
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=f"no server answers at {endpoint}: nobody listens there"):
        djinn.connect(endpoint, timeout_s=60)
    with pytest.raises(Unreachable, match="nobody listens there"):
        asyncio.run(connecting(endpoint))
    assert time.monotonic() - begin < 30  # not until the time given is over
    second = start("--port", 0)
    second.wait_for("djinn: serving at")
    with djinn.connect(endpoint) as server:
        assert server.welcome.pid == second.process.pid
        assert (
            server.connection.sharing.lease is not None
        )  # shared memory works over the new sockets
        assert server.status().engines[0].pid not in (0, engine)
    assert second.end() == 0
    assert os.listdir(home / "djinn") == []


async def connecting(endpoint: str) -> None:
    async with aio.connect(endpoint, timeout_s=60):
        raise AssertionError("connected to nobody")


def test_ctrl_c_in_a_terminal_ends_a_server_that_serves_and_its_engine_and_leaves_nothing(odd):
    with djinn.connect(odd.ipc) as server:
        server.model("tiny").run(FRANCE, stop_at=1)
    ends_at_ctrl_c(odd.started, odd.home)


def test_ctrl_c_in_a_terminal_ends_a_server_whose_engine_starts_and_leaves_nothing(start, home):
    started = start("--port=0", "--model=tiny", terminal=True)
    started.wait_for("djinn: serving at")
    ends_at_ctrl_c(started, home)


def ends_at_ctrl_c(started: Started, home: Path) -> None:
    """The terminal sends SIGINT to all of its foreground processes."""
    engine = engine_of(f"ipc://{home}/djinn/djinn.sock")
    started.types(b"\x03")
    assert started.wait() == 0
    assert started.words.endswith("djinn: stopped\n")
    wait_gone(engine)
    assert os.listdir(home / "djinn") == []
