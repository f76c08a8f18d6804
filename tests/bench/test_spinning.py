"""What spinning saves and costs is measured beside what sleeps, where there are CPUs for it."""

import pytest
from click.testing import CliRunner

from bench import noop, resume_latency
from bench.budgets import awake, line_of
from bench.spinning import Spinning, over
from djinn_zmq.probe import pinning, schema

WITHOUT = [f"--without={one}" for one in ("ipc", "server only", "front", "raw socket")]


def test_ends_that_spin_are_measured_beside_those_that_sleep_and_so_is_what_they_cost(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pinning, "SPINNING", 1)
    path = tmp_path / "noop.json"
    options = ("--quick", "--samples=20", "--no-load", "--spin-us=50", *WITHOUT, f"--json={path}")
    ended = CliRunner().invoke(noop.main, options)
    assert ended.exit_code == 0, ended.output
    found = schema.read(path)
    for idle_ms in (0, 2, 50):
        lines = [line_of(one, found, "") for one in awake(idle_ms, 50) if one.part == "spin-noop"]
        assert [len(line.ratios) for line in lines] == [2, 2, 2, 2]
        assert {line.verdict for line in lines} == {"-"}
    assert all(one.limit is None for one in found.ratios if "--spin-us" in one.name)
    assert not any("ipc" in one.name for one in found.samples)
    assert all(one.cpus is None for one in found.pinned)


@pytest.mark.parametrize("bench", [noop, resume_latency])
def test_with_too_few_cpus_spinning_is_refused_before_anything_is_measured(
    bench, tmp_path, monkeypatch
):
    monkeypatch.setattr(pinning, "SPINNING", 4096)
    where = f"--output-dir={tmp_path}" if bench is resume_latency else f"--json={tmp_path}/a.json"
    ended = CliRunner().invoke(bench.main, ["--spin-us=200", where])
    assert ended.exit_code == 1
    assert "ends that spin need a CPU each" in ended.stderr and "4096" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_gap_is_measured_with_the_shortest_spin_that_reaches_over_it():
    spins = [Spinning(spin_us, {}, ()) for spin_us in (200, 3_000, 60_000)]
    assert [over(gap_s, spins).spin_us for gap_s in (0, 0.002, 0.05)] == [200, 3_000, 60_000]
    assert over(0.05, spins[:2]).spin_us == 3_000 and over(0.05, []) is None
