"""Ends that spin are measured where there are CPUs for it (how: test_bench.py)."""

import pytest
from click.testing import CliRunner

from bench import noop, resume_latency
from bench.spinning import Spinning, over
from djinn_zmq.probe import pinning


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
