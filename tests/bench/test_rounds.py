"""The script that looks whether memory comes back runs end to end; sizes are not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_it_counts_keys_and_values_and_draws_what_stays_resident(tmp_path):
    pytest.importorskip("matplotlib")
    found, drawn = tmp_path / "rounds.json", tmp_path / "rounds.png"
    command = [sys.executable, "-m", "bench.rounds", "--rounds=3", "--warm-up=1", "--positions=20"]
    ended = subprocess.run(
        [*command, f"--json={found}", f"--plot={drawn}"],
        cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "start" in ended.stdout and drawn.read_bytes().startswith(b"\x89PNG")
    results = json.loads(found.read_text())
    rows = results["tables"]["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert len({row["kv"] for row in rows}) == 1
