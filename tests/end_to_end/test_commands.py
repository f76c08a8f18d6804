"""The commands, as a user types them: what they say, and their exit status."""

import json
import os
import subprocess
import sys

import pytest

import djinn_zmq as djinn
from djinn_zmq.cli.main import COMMANDS
from djinn_zmq.errors import AccessDenied
from tests.end_to_end.commands import WAIT_S

FRANCE = "the capital of france is"


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


# ---- the rest


def test_stop_over_tcp_is_refused(served, refused):
    words = f"cannot stop {served.tcp}: a server is stopped over its ipc socket"
    assert words in refused("stop", "--server", served.tcp)
    with (
        djinn.connect(served.tcp) as server,
        pytest.raises(AccessDenied, match="only the user who"),
    ):
        server.stop()
    assert served.status().pid == served.process.pid


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
