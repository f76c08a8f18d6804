import json
import os

import numpy as np
import pytest

from djinn_zmq.probe import results as results_module
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import SCHEMA, Results, write
from djinn_zmq.probe.samples import Samples, ratio


@pytest.fixture
def results() -> Results:
    samples = [Samples.of("a", [1.0, 2.0, 3.0]), Samples.of("b", [2.0, 4.0, 6.0])]
    return Results("test", this_machine(), {"samples": 3}, [], samples, [ratio(*samples)])


def test_a_file_names_schema_machine_versions_and_carries_all_samples(results, tmp_path):
    write(results, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["schema"] == SCHEMA
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    assert {"djinn_zmq", "python", "pyzmq", "libzmq", "msgspec"} <= set(found["versions"])
    assert found["samples"][0]["samples"] == [[1.0], [2.0], [3.0]]
    assert found["ratios"][0]["n"] == [3, 3]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(results, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(results_module.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(results, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_what_is_no_number_is_refused_instead_of_written(results, tmp_path):
    results.settings["rate"] = float("nan")
    with pytest.raises(ValueError):
        write(results, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_samples_stand_on_one_line_however_many_there_are(tmp_path):
    samples = [Samples("many", np.random.default_rng(0).random((20, 100)))]
    write(Results("test", this_machine(), {}, [], samples), tmp_path / "out.json")
    lines = (tmp_path / "out.json").read_text().splitlines()
    assert len(lines) < 60
    assert sum('"samples": [[' in line for line in lines) == 1
