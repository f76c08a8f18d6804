"""Each benchmark runs end to end. What it finds is not asserted: times depend on the machine."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 90


def run(bench: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"bench.{bench}", *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def results_of(bench: str, folder: Path, *options: str) -> tuple[dict, str]:
    """The JSON that a quick run wrote, and what it printed."""
    path = folder / f"{bench}.json"
    ended = run(bench, "--quick", f"--json={path}", *options)
    assert ended.returncode == 0, ended.stderr
    return json.loads(path.read_text()), ended.stdout


def check_common(found: dict, printed: str) -> None:
    assert found["schema"] == 1
    assert found["machine"]["cpu"] in printed
    assert {"djinn_zmq", "python", "pyzmq", "libzmq"} <= set(found["versions"])
    for one in found["samples"]:
        assert one["n"] == sum(len(row) for row in one["samples"]) > 0
        assert all(second > 0 for row in one["samples"] for second in row)
    for one in found["ratios"]:
        assert one["low"] <= one["high"] and min(one["n"]) > 0
    assert "client (1 process" in printed and "servers (" in printed
    if len(os.sched_getaffinity(0)) > 1:
        sides = {one["who"]: one["cpus"] for one in found["pinned"]}
        assert not set(sides["client"]) & set(sides["servers"])


def test_noop_measures_every_case_at_every_gap_and_writes_all_of_it_down(tmp_path):
    pytest.importorskip("grpc")
    found, printed = results_of("noop", tmp_path, "--samples=20", "--clients=2")
    check_common(found, printed)
    names = {one["name"] for one in found["samples"]}
    for gap in ("back to back", "2 ms idle", "50 ms idle"):
        for transport in ("ipc", "tcp"):
            for case in ("djinn, through server and engine", "bare ROUTER front and PAIR"):
                assert f"{gap}, {transport}: {case}" in names
    assert [one["limit"] for one in found["ratios"]].count(1.3) == 6
    cases = {row["case"] for row in found["tables"]["load"]}
    assert {"ipc: djinn", "tcp: gRPC python, sync", "tcp: gRPC python, aio"} <= cases
    assert all(row["n"] > 0 and row["requests_per_s"] > 0 for row in found["tables"]["load"])


def test_upload_measures_every_way_of_an_activation(tmp_path):
    found, printed = results_of("upload", tmp_path, "--samples=4")
    check_common(found, printed)
    names = {one["name"] for one in found["samples"]}
    assert names == {"tcp: raw socket", "ipc: slot", "ipc: frames", "tcp: frames"}
    assert found["settings"]["nbytes"] == 1031 * 5120 * 2
    assert {one["limit"] for one in found["ratios"]} == {0.3, 1.2, None}


@pytest.mark.parametrize("bench", ["noop", "upload"])
def test_help_says_what_is_compared_and_what_is_wanted(bench):
    ended = CliRunner().invoke(import_module(f"bench.{bench}").main, ["--help"])
    assert ended.exit_code == 0
    assert "Target" in ended.stdout and "raw socket" in ended.stdout
