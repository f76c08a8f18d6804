"""How fast keys and values move is told by the engine's own events."""

import pytest
from click.testing import CliRunner

from bench import swap
from djinn_zmq.probe import schema
from djinn_zmq.wire.tiers import Event


def event(kind: str, begin_s: float, end_s: float, nbytes: int = 10) -> Event:
    return Event(1, end_s, kind, 7, "keys and values", nbytes, round((end_s - begin_s) * 1e9))


def test_time_in_which_two_moves_are_under_way_counts_once():
    events = [event("evict", 1, 3), event("prefetch", 2, 4), event("evict", 6, 7)]
    assert swap.busy_s(events) == pytest.approx(3 + 1)
    assert swap.moved(events, "evict") == 20 and swap.moved(events, "prefetch") == 10


def test_every_way_is_measured_beside_bare_copies_of_as_many_bytes(tmp_path):
    path = tmp_path / "swap.json"
    options = ["--shape=small", "--device=cpu", "--positions=64", "--rounds=2", f"--json={path}"]
    ended = CliRunner().invoke(swap.main, options)
    assert ended.exit_code == 0, ended.output
    found = schema.read(path)
    assert {row["way"] for row in found.tables["rates"]} == {
        f"{who}{way}" for who in ("", "bare, ") for way in ("out", "in", "both at once")
    }
    assert all(row["n"] == 2 and row["gb_per_s"] > 0 for row in found.tables["rates"])
    assert [one.limit for one in found.ratios] == [None] * 3  # the target is a GPU's
    assert found.settings["nbytes"] == 2 * 12 * 64 * 256 * 4


def test_conversations_too_small_to_fill_a_budget_are_refused():
    ended = CliRunner().invoke(swap.main, ["--shape=tiny", "--device=cpu", "--positions=8"])
    assert ended.exit_code == 1 and "a device's budget is at least 1 MiB" in ended.stderr
