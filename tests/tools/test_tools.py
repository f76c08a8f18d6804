"""Each latency tool runs against a real server. What it finds is not asserted: times depend on the
machine."""

import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import djinn_zmq as djinn
from djinn_zmq.probe import schema, serving
from tools import resume

FEW = ("--samples=8", "--warmup=2")

pytestmark = pytest.mark.usefixtures("unpinned")


def tool(name: str, *options: str) -> Result:
    return CliRunner().invoke(getattr(import_module(f"tools.{name}"), name), options)


def found_by(name: str, folder: Path, *options: str) -> tuple[schema.File, str]:
    """The results, read through the schema, and what was printed."""
    path = folder / f"{name}.json"
    ended = tool(name, *FEW, f"--json={path}", *options)
    assert ended.exit_code == 0, ended.output
    return schema.read(path), ended.stdout


def test_tcp_compares_fresh_and_persistent_connections_and_draws_them(tmp_path):
    picture = tmp_path / "out.png"
    found, printed = found_by("tcp", tmp_path, "--nbytes=100000", f"--plot={picture}")
    names = [one.name for one in found.samples]
    assert names[:2] == ["tcp, persistent connection", "tcp, connect and echo"]
    assert all(one.n == 8 for one in found.samples) and found.machine.cpu in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_zmq_echo_sets_zeromq_beside_the_raw_socket(tmp_path):
    found, printed = found_by("zmq_echo", tmp_path, "--nbytes=3000000", "--idle-ms=1")
    assert [one.n for one in found.ratios] == [(8, 8), (8, 8)]
    assert found.settings["idle_ms"] == 1 and "ipc, DEALER to ROUTER" in printed


def test_noop_measures_every_way_there_is_and_names_what_is_not(tmp_path, served, lend):
    lend(serving)
    found, _ = found_by("noop", tmp_path)
    names = {one.name for one in found.samples}
    assert {"ipc: server only", "tcp: server and engine"} <= names
    lanes = [one for one in names if "lane" in one]
    assert lanes or found.not_measured[0].what == "lane to the engine"
    alone, _ = found_by("noop", tmp_path, f"--server={served.tcp}")
    assert {one.name for one in alone.samples} == {"tcp: server only", "tcp: server and engine"}


def test_resume_measures_every_kind_of_edit_with_its_spans(tmp_path, served):
    found, printed = found_by("resume", tmp_path, f"--server={served.ipc}", "--positions=5")
    assert len(found.samples) % 6 == 0
    table = found.tables["spans of ipc, edited: row, to: logits"]
    spans = [row["span"] for row in table]
    assert spans[0] == "client encode" and spans[-1] == "client decode"
    assert {"wire", "restore", "edit", "compute"} <= set(spans) and "edited: all" in printed


@pytest.mark.parametrize("way", ["ipc", "tcp"])
def test_decompose_climbs_the_ladder_and_its_steps_and_rest_make_the_whole(tmp_path, served, way):
    path = tmp_path / "out.json"
    ended = tool("decompose", *FEW, f"--json={path}", f"--server={getattr(served, way)}")
    found = schema.read(path)
    rows = {row["step"]: row["seconds"] for row in found.tables["steps"]}
    whole = rows.pop("whole")
    assert sum(rows.values()) == pytest.approx(whole)
    assert list(rows)[:3] == ["raw socket", "ZeroMQ", "codec"] and rows["compute"] > 0
    assert {"client", "messages", "answer", "wake-up"} <= set(rows)
    # With eight samples on a busy machine they may miss; what must be right is the verdict.
    assert found.checks[0].held == (abs(rows["rest"]) <= 0.1 * whole) == (ended.exit_code == 0)
    assert "% of the whole" in ended.stdout


def test_decompose_carries_an_activation_and_draws_where_its_time_goes(tmp_path, served):
    path, picture = tmp_path / "out.json", tmp_path / "out.pdf"
    server = served.tcp.removeprefix("tcp://")
    ended = tool("decompose", *FEW, f"--json={path}", f"--server={server}", "--carry=activation",
                 "--to=ready", "--layer=3", f"--plot={picture}")  # fmt: skip
    found = schema.read(path)
    assert found.checks[0].held == (ended.exit_code == 0), ended.output
    assert found.settings["nbytes"] == 32 * 64 * 2 and found.settings["layer"] == 3
    assert picture.read_bytes().startswith(b"%PDF")


def test_decompose_is_installed_as_a_command():
    command = [Path(sys.executable).parent / "djinn-decompose", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Usage: djinn-decompose" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--server=127.0.0.1:1"], "no server answers at tcp://127.0.0.1:1"),
        (["--layer=9"], 'layer 9 does not exist: "tiny" has 4 layers (0-4)'),
        (["--model=huge"], '"huge" is not served here'),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence(served, options, words, monkeypatch):
    monkeypatch.setitem(djinn.connect.__kwdefaults__, "timeout_s", 1.0)  # nobody to wait for
    ended = CliRunner().invoke(resume.resume, [*FEW, f"--server={served.tcp}", *options])
    assert ended.exit_code == 1 and isinstance(ended.exception, SystemExit)
    assert ended.stderr.startswith("Error: ") and words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["tcp", "zmq_echo", "noop", "resume", "decompose"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_tool_is_a_command_with_a_help_that_shows_how_it_is_used(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"tools.{name}", run_name="__main__")  # `python -m tools.NAME`
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"Usage: python -m tools.{name}" in said
    for option in ("--json", "--samples", "--warmup", "--idle-ms", "--plot"):
        assert option in said
    assert said.count(f"python -m tools.{name}") > 1
