"""The script that looks whether memory comes back runs end to end; sizes are not asserted."""

import json

import pytest
from click.testing import CliRunner

from bench import rounds


def test_it_counts_keys_and_values_and_draws_what_stays_resident(tmp_path, lend):
    pytest.importorskip("matplotlib")
    lend(rounds)
    found, drawn = tmp_path / "rounds.json", tmp_path / "rounds.png"
    options = ["--rounds=3", "--warm-up=1", "--positions=20"]
    ended = CliRunner().invoke(rounds.main, [*options, f"--json={found}", f"--plot={drawn}"])
    assert ended.exit_code == 0, ended.output
    assert "start" in ended.stdout and drawn.read_bytes().startswith(b"\x89PNG")
    results = json.loads(found.read_text())
    rows = results["tables"]["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert len({row["kv"] for row in rows}) == 1
