from dataclasses import replace

import numpy as np
import pytest

from bench.kept_rounds import KeptRounds
from djinn_zmq.errors import RequestError
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results

LABELS = {"a": {"layer": 1}, "b": {}}


@pytest.fixture
def results() -> Results:
    return Results("test", this_machine(), {"per_turn": 2, "repeat": 3, "output_dir": "x"})


def turn(*seconds):
    return {"a": np.array(seconds), "b": 2 * np.array(seconds)}


def test_rounds_come_back_as_they_were_put_away(tmp_path, results):
    kept = KeptRounds(tmp_path / "rounds.jsonl", results, ["a", "b"])
    assert kept.load(fresh=False) == 0
    kept.add(turn(0.25, 0.5))
    kept.add(turn(1.0, 2.0))
    results.settings["repeat"] = 9  # how long it goes on may change
    again = KeptRounds(kept.path, results, ["a", "b"])
    assert again.load(fresh=False) == 2 and again.sittings == 2
    a, b = again.samples(LABELS)
    assert a.seconds.tolist() == [[0.25, 0.5], [1.0, 2.0]] and a.labels == {"layer": 1}
    assert b.seconds.tolist() == [[0.5, 1.0], [2.0, 4.0]]


def test_a_line_that_was_cut_off_is_left_out(tmp_path, results):
    kept = KeptRounds(tmp_path / "rounds.jsonl", results, ["a", "b"])
    kept.load(fresh=False)
    kept.add(turn(1.0, 2.0))
    with kept.path.open("a") as file:
        file.write('\n{"round": {"a": [1.0')
    assert KeptRounds(kept.path, results, ["a", "b"]).load(fresh=False) == 1


def test_rounds_of_something_else_are_refused_and_forgotten_on_demand(tmp_path, results):
    kept = KeptRounds(tmp_path / "rounds.jsonl", results, ["a", "b"])
    kept.load(fresh=False)
    kept.add(turn(1.0, 2.0))
    others = [
        (replace(results, settings={"per_turn": 3}), ["a", "b"], "settings differ"),
        (results, ["a"], "cases differ"),
        (
            replace(results, machine=replace(results.machine, cores=99)),
            ["a", "b"],
            "machine differ",
        ),
    ]
    for other, names, words in others:
        with pytest.raises(RequestError, match=words):
            KeptRounds(kept.path, other, names).load(fresh=False)
    assert KeptRounds(kept.path, results, ["a"]).load(fresh=True) == 0
