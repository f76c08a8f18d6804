"""The commands, as a user types them: what they say, their exit status, and what they leave."""

import asyncio
import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.cli.main import COMMANDS, main
from djinn_zmq.errors import (
    AccessDenied,
    DjinnError,
    Lost,
    ModelRefused,
    RequestError,
    UnknownModel,
    Unreachable,
)
from djinn_zmq.server import command
from djinn_zmq.settings import Settings
from tests.end_to_end.conftest import free_port

FRANCE = "the capital of france is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"
HAS_GPU = Path("/proc/driver/nvidia/version").exists()
WAIT_S = 60.0


OWN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Started:
    """A command that runs on, and what it has said so far, its engine's words among it.

    terminal: whether it runs in one of its own."""

    def __init__(self, arguments, environment, *, terminal: bool = False) -> None:
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self._ours = os.fdopen(ours, "r+b" if terminal else "rb", buffering=0)
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", OWN_TERMINAL] if terminal else []), *arguments],
            env=environment,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.words = ""
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose other end is gone
            for line in self._ours:
                with self._news:
                    self.words += line.decode().replace("\r", "")
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, *either: str) -> None:
        """Until it has said one of these, or has ended."""

        def said() -> bool:
            return any(words in self.words for words in either)

        with self._news:
            self._news.wait_for(lambda: said() or self._ended, WAIT_S)
        assert said(), self.words

    def types(self, keys: bytes) -> None:
        self._ours.write(keys)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        self._ours.close()
        assert "Traceback" not in self.words, self.words


@pytest.fixture
def home(short_path) -> Path:
    """A user's runtime directory."""
    return short_path


def environment_of(home: Path, cache: Path) -> dict[str, str]:
    """A user's environment, with nothing of this one's servers and models in it."""
    clean = {name: value for name, value in os.environ.items() if name != "DJINN_ENDPOINT"}
    return clean | {"XDG_RUNTIME_DIR": str(home), "DJINN_CACHE": str(cache)}


@pytest.fixture
def environment(home, tmp_path) -> dict[str, str]:
    return environment_of(home, tmp_path / "cache")


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


@pytest.fixture
def run(environment):
    """`djinn …` to its end: (exit status, what it said on stdout, on stderr)."""

    def run(*arguments, **more) -> tuple[int, str, str]:
        clean = {"DJINN_ENDPOINT": None} | environment | more
        done = CliRunner(env=clean).invoke(main, list(map(str, arguments)))
        assert isinstance(done.exception, SystemExit | None), done.exception
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture
def run_alone(environment):
    """The same of a process of its own. module: as in `python -m`."""

    def run_alone(*arguments, module="djinn_zmq.cli.main", **more) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run_alone


def one_sentence(outcome: tuple[int, str, str]) -> str:
    """What a command says that ends at once, with exit status 1 and a single sentence."""
    status, said, complaint = outcome
    assert (status, said) == (1, ""), (status, said, complaint)
    assert complaint.startswith("Error: ") and len(complaint.splitlines()) == 1, complaint
    return complaint


@pytest.fixture
def refused(run):
    return lambda *arguments, **more: one_sentence(run(*arguments, **more))


@pytest.fixture
def refused_server(refused, monkeypatch):
    """What `djinn serve` says that must not serve."""
    for name in ("keep_freed_memory", "allow_many_descriptors"):
        monkeypatch.setattr(command, name, lambda: None)  # those of this process stay
    monkeypatch.setattr(command.Server, "serve", lambda server: pytest.fail("it serves"))
    return lambda *options: refused("serve", *options)


@pytest.fixture
def refused_alone(run_alone):
    """The same of a server's own process."""
    return lambda *options: one_sentence(run_alone(*options, module="djinn_zmq.server"))


def wait_gone(pid: int) -> None:
    """Blocks until *pid* has ended."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            assert poll.poll(WAIT_S * 1000), f"process {pid} goes on"
        finally:
            os.close(handle)


def engine_of(endpoint: str) -> int:
    with djinn.connect(endpoint) as server:
        return server.status().engines[0].pid


# ---- serving


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


# ---- refusing to serve


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines: give --keys"),
        (["--host", "::"], "--host :: can be reached from other machines: give --keys"),
        (["--host", "example.org"], "--host example.org can be reached from other machines"),
        (["--model", "nonsense"], '"nonsense" is no served name (tiny), no directory, and no hub'),
        (["--model", "./nothing"], '"./nothing" is no served name (tiny), no directory'),
        (["--model", str(TINY.parent)], "models holds no model: it has no config.json"),
        (["--keys", "/nowhere"], "no /nowhere/server.key: make it with 'djinn keys new server"),
        (["--ipc", "/" + "x" * 120], "is too long: with its suffixes 127 bytes, at most 107 fit"),
    ],
)
def test_a_server_that_cannot_serve_says_why_in_one_sentence(refused_server, home, options, words):
    assert words in refused_server("--port", free_port(), *options)
    folder = home / "djinn"
    assert not folder.exists() or os.listdir(folder) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--random-weights", "foo"],
            'no shape "foo": there are llama-2-13b, llama-2-7b, llama-3.1-8b, small',
        ),
        (["--grace-s", "nan"], "grace_s is nan: it must be a number"),
        (
            ["--host-memory", 10**9],
            "--host-memory 1000000000 (MiB) is more than this machine has: ",
        ),
        (["--gpu-memory", 10**9], "--gpu-memory 1000000000 (MiB) is more than this machine has: "),
        (["--state", "STATE", "--disk", 10**12], "is more than the file system of STATE has: "),
        (
            ["--ipc", "STATE/no/a.sock"],
            "--ipc STATE/no/a.sock: there is no directory STATE/no: make",
        ),
    ],
)
def test_what_this_machine_cannot_have_is_refused_by_name_and_nothing_is_made(
    environment, home, monkeypatch, options, words
):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # that of this process stays
    monkeypatch.setattr(command.Server, "serve", lambda server: pytest.fail("it serves"))
    options = [str(option).replace("STATE", str(home)) for option in options]
    done = CliRunner(env=environment).invoke(main, ["serve", "--port", "0", *options])
    assert (done.exit_code, done.stdout) == (1, "")
    assert words.replace("STATE", str(home)) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(home.glob("**/*.sock*")) and not (home / "no").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port", "http"],
        ["--gpu", "-1"],
        ["--threads", "0"],
        ["--host-memory", "0"],
        ["--threads", "1025"],
        ["--grace-s", "0"],
        ["--grace-s", "1e9"],
        ["--spin-us", "1000001"],
        ["--dtype", "int8"],
        ["--device", "cuda"],
        ["--frobnicate"],
        ["tiny"],
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(environment, home, options):
    done = CliRunner(env=environment).invoke(main, ["serve", *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert options[0] in done.stderr
    assert os.listdir(home) == []


def test_a_second_server_on_a_socket_is_refused_by_name_and_the_first_goes_on(
    served, tiny, refused_alone
):
    files = sorted(os.listdir(served.path.parent))
    complaint = refused_alone("--port", 0, "--ipc", served.path)
    assert f"a server already serves {served.path}: stop it with 'djinn stop'" in complaint
    assert sorted(os.listdir(served.path.parent)) == files
    assert tiny.run(FRANCE).top(1)[0].token == "paris"
    with served.connect() as newcomer:
        assert newcomer.ping() == "serving"


def test_a_port_in_use_is_refused_by_name_and_nothing_of_the_second_server_stays(
    served, tiny, refused_alone, home
):
    port = served.tcp.rpartition(":")[2]
    complaint = refused_alone("--port", port)
    assert f"tcp://127.0.0.1:{port} is in use by another process" in complaint
    assert os.listdir(home / "djinn") == []
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_the_ipc_path_never_costs_a_file_that_is_no_socket(refused_server, home):
    precious = home / "notes.txt"
    precious.write_text("keep me")
    (home / "folder").mkdir()
    for path in (precious, home / "folder"):
        assert f"{path} exists and is no socket" in refused_server("--port", 0, "--ipc", path)
    beside = [
        home / f"notes.{end}" for end in ("lease", "news", "lock")
    ]  # what it makes there itself
    for path in beside:
        path.write_text("keep me")
        assert f"{path} exists and is no" in refused_server("--port", 0, "--ipc", home / "notes")
        path.rename(path.with_suffix(".mine"))
    assert precious.read_text() == "keep me"
    assert sorted(os.listdir(home)) == ["folder", "notes.mine", "notes.txt"]


@pytest.mark.parametrize("mode", [0o755, 0o701])
def test_a_runtime_directory_that_others_can_enter_is_refused(refused, refused_server, home, mode):
    (home / "djinn").mkdir()
    (home / "djinn").chmod(mode)
    words = f"{home}/djinn must be a directory of uid {os.getuid()} with mode 0700: it belongs to"
    assert words in refused_server("--port", 0)
    assert words in refused("ps")
    assert words in refused_server("--port", 0, "--ipc", home / "djinn" / "x.sock")
    assert os.listdir(home / "djinn") == []


def test_a_runtime_directory_that_is_a_link_is_refused(refused_server, home, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (home / "djinn").symlink_to(tmp_path / "elsewhere")
    assert "djinn is no directory" in refused_server("--port", 0)


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


# ---- looking


def test_ps_shows_models_engines_sessions_checkpoints_and_memory(served, server, tiny, run):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    status = server.status()
    code, said, complaint = run("ps", "--server", served.endpoint)
    assert (code, complaint) == (0, "")
    blocks = said.strip().split("\n\n")
    assert blocks[0].startswith(f"djinn {status.version}, pid {status.pid}, up ")
    assert served.endpoint in blocks[0] and served.tcp in blocks[0]
    assert "can serve by name: tiny" in said
    heads = [block.split() for block in blocks]
    engines, models, sessions = (
        next(block for block, head in zip(blocks, heads, strict=True) if head[0] == name)
        for name in ("ENGINE", "MODEL", "SESSION")
    )
    assert engines.splitlines()[1].split()[:4] == ["0", "cpu", "ready", str(status.engines[0].pid)]
    assert models.splitlines()[1].split()[:4] == ["tiny", "LlamaForCausalLM", "4", "64"]
    mine = next(line for line in sessions.splitlines() if f"{tiny.session_id:016x}" in line)
    assert mine.split()[:6] == [
        f"{tiny.session_id:016x}",
        "*",
        f"uid:{os.getuid()}",
        "tiny",
        "open",
        "1",
    ]
    assert f" {os.getpid()}  " in mine and "python" in mine
    assert blocks[-1].startswith(f"memory: {status.memory.checkpoints} checkpoint")
    assert point.nbytes <= status.memory.used


def test_ps_prints_everything_as_json_too(served, server, tiny, run):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    code, said, _ = run("ps", "--json", "--server", served.endpoint)
    assert code == 0
    shown = json.loads(said)
    status = server.status()
    assert shown["pid"] == status.pid and shown["endpoints"] == list(status.endpoints)
    assert shown["models"][0]["name"] == "tiny" and shown["models"][0]["num_layers"] == 4
    assert shown["engines"][0]["state"] == "ready"
    mine = next(one for one in shown["sessions"] if one["id"] == tiny.session_id)
    assert (mine["checkpoints"], mine["state"], mine["yours"]) == (1, "open", True)
    assert shown["memory"]["checkpoints"] >= 1 and shown["memory"]["used"] >= point.nbytes


def test_ps_goes_to_the_endpoint_of_the_environment_and_over_tcp(served, run):
    for endpoint in (served.endpoint, served.tcp):
        code, said, _ = run("ps", DJINN_ENDPOINT=endpoint)
        assert code == 0 and f"pid {served.process.pid}," in said


def test_connect_goes_to_the_endpoint_of_the_environment(served, monkeypatch):
    monkeypatch.setenv("DJINN_ENDPOINT", served.endpoint)
    with djinn.connect() as server:
        assert server.welcome.pid == served.process.pid


@pytest.mark.parametrize("command", ["ps", "stop"])
def test_without_a_server_a_command_says_so_in_one_sentence(refused, home, command):
    complaint = refused(command)
    assert f"no server at ipc://{home}/djinn/djinn.sock: start one with 'djinn serve'" in complaint


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("nonsense", "use ipc://PATH or tcp://HOST:PORT"),
        ("http://localhost", "use ipc://PATH or tcp://HOST:PORT"),
        ("tcp://localhost", "cannot connect to tcp://localhost"),
        ("ipc:///nowhere/djinn.sock", "no server at ipc:///nowhere/djinn.sock"),
    ],
)
def test_an_endpoint_that_leads_nowhere_is_refused_in_one_sentence(refused, endpoint, words):
    assert words in refused("ps", "--server", endpoint)
    assert words in refused("ps", DJINN_ENDPOINT=endpoint)


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


def test_stop_over_tcp_is_refused(served, refused):
    words = f"cannot stop {served.tcp}: a server is stopped over its ipc socket"
    assert words in refused("stop", "--server", served.tcp)
    with (
        djinn.connect(served.tcp) as server,
        pytest.raises(AccessDenied, match="only the user who"),
    ):
        server.stop()
    assert served.status().pid == served.process.pid


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


# ---- the rest


def test_help_of_every_command_is_there_without_torch(environment):
    program = (
        "import sys\n"
        "from djinn_zmq.cli.main import main\n"
        "for words in [[], *([name] for name in sys.argv[1:]), ['keys', 'new'], ['keys', 'allow']]:\n"
        "    main([*words, '--help'], prog_name='djinn', standalone_mode=False)\n"
        "    for heavy in ('torch', 'transformers', 'cupy'):\n"
        "        assert heavy not in sys.modules, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMANDS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: djinn {name}" in done.stdout
    assert "--private" not in done.stdout


def test_a_command_that_does_not_exist_is_a_usage_error(run):
    status, _, complaint = run("frobnicate")
    assert status == 2 and "No such command 'frobnicate'" in complaint
    assert run("--version")[1].startswith("djinn, version ")


def test_the_demo_does_the_main_job_and_holds_what_it_shows(run, home):
    status, said, complaint = run("demo")
    assert status == 0, (said, complaint)
    assert complaint == ""
    assert said.count("✓") >= 4 and "✗" not in said
    assert "paris" in said and "berlin" in said
    assert "all of it held, in " in said.splitlines()[-1]
    assert os.listdir(home / "djinn") == []
