"""Each benchmark runs end to end. What it finds is not asserted: times depend on the machine."""

import json
import os
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import noop, spinning, upload
from bench.budgets import awake, line_of
from djinn_zmq.probe import pinning, schema
from tests.bench.conftest import lending

SPIN_US = 50

pytestmark = pytest.mark.usefixtures("unpinned")


def results_of(bench, folder: Path, *options: str) -> tuple[Path, str]:
    """The file that a quick run wrote, and what it printed."""
    path = folder / f"{bench.__name__}.json"
    ended = CliRunner().invoke(bench.main, ["--quick", f"--json={path}", *options])
    assert ended.exit_code == 0, ended.output
    return path, ended.stdout


def check_common(path: Path, printed: str) -> dict:
    """The results, as they were written."""
    found = json.loads(path.read_text())
    assert found["schema"] == 1
    assert found["machine"]["cpu"] in printed
    assert {"djinn_zmq", "python", "pyzmq", "libzmq"} <= set(found["versions"])
    for one in found["samples"]:
        assert one["n"] == sum(len(row) for row in one["samples"]) > 0
        assert all(second > 0 for row in one["samples"] for second in row)
    for one in found["ratios"]:
        assert one["low"] <= one["high"] and min(one["n"]) > 0
    assert "client (1 process" in printed and "servers (" in printed
    return found


def check_pinned_apart(found: dict) -> None:
    if len(os.sched_getaffinity(0)) > 1:
        sides = {one["who"]: one["cpus"] for one in found["pinned"]}
        assert sides["client"] and sides["servers"]
        assert not set(sides["client"]) & set(sides["servers"])


@pytest.fixture(scope="module")
def noops(tmp_path_factory, served):
    """Every case of a no-op, measured once, with ends that spin: the file, and what was printed."""
    pytest.importorskip("grpc")

    def begun(_, *more):  # one more engine takes six seconds: servers that spin are test_serving's
        assert more == (f"--spin-us={SPIN_US}",)
        return nullcontext(lambda: served)

    with pytest.MonkeyPatch.context() as patch, lending(served) as lend:
        lend(noop)
        patch.setattr(spinning, "begun", begun)
        patch.setattr(pinning, "SPINNING", 1)
        patch.setattr(noop, "QUICK", replace(noop.QUICK, window_s=0.05))
        return results_of(
            noop, tmp_path_factory.mktemp("noop"),
            "--samples=20", "--clients=2", f"--spin-us={SPIN_US}",
        )  # fmt: skip


def test_noop_measures_every_case_at_every_gap_and_writes_all_of_it_down(noops):
    found = check_common(*noops)
    names = {one["name"] for one in found["samples"]}
    for gap in ("back to back", "2 ms idle", "50 ms idle"):
        for transport in ("ipc", "tcp"):
            for case in ("djinn, through server and engine", "bare ROUTER front and PAIR"):
                assert f"{gap}, {transport}: {case}" in names
    assert [one["limit"] for one in found["ratios"]].count(1.3) == 6
    cases = {row["case"] for row in found["tables"]["load"]}
    assert {"ipc: djinn", "tcp: gRPC python, sync", "tcp: gRPC python, aio"} <= cases
    assert all(row["n"] > 0 and row["requests_per_s"] > 0 for row in found["tables"]["load"])


def test_ends_that_spin_are_measured_beside_those_that_sleep_and_so_is_what_they_cost(noops):
    found = schema.read(noops[0])
    for idle_ms in (0, 2, 50):
        about = [one for one in awake(idle_ms, SPIN_US) if one.part == "spin-noop"]
        lines = [line_of(one, found, "") for one in about]
        assert [len(line.ratios) for line in lines] == [2, 2, 2, 2]
        assert {line.verdict for line in lines} == {"-"}
    assert all(one.limit is None for one in found.ratios if "--spin-us" in one.name)
    assert all(one.cpus is None for one in found.pinned)


def test_noop_pins_the_client_and_the_servers_apart_and_leaves_out_what_it_is_told_to(
    tmp_path, lend, monkeypatch
):
    lend(noop)
    calls = {"ipc: djinn": len, "tcp: djinn": len}
    monkeypatch.setattr(noop.roundtrips, "cases", lambda *_: nullcontext((calls, [])))
    measured = []
    monkeypatch.setattr(noop, "measure_round_trips", lambda chosen, *_: measured.extend(chosen))
    path, _ = results_of(noop, tmp_path, "--no-load", "--without=ipc")
    check_pinned_apart(json.loads(path.read_text()))
    assert measured == ["tcp: djinn"]


def test_upload_measures_every_way_of_an_activation(tmp_path, lend):
    lend(upload)
    found = check_common(*results_of(upload, tmp_path, "--samples=4"))
    check_pinned_apart(found)
    names = {one["name"] for one in found["samples"]}
    assert names == {"tcp: raw socket", "ipc: slot", "ipc: frames", "tcp: frames"}
    assert found["settings"]["nbytes"] == 1031 * 5120 * 2
    assert {one["limit"] for one in found["ratios"]} == {0.3, 1.2, None}


@pytest.mark.parametrize("bench", ["noop", "upload"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_each_is_a_command_whose_help_says_what_is_compared_and_what_is_wanted(
    bench, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [bench, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"bench.{bench}", run_name="__main__")  # `python -m bench.NAME`
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"Usage: python -m bench.{bench}" in said
    assert "Target" in said and "raw socket" in said
