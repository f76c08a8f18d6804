import json
from pathlib import Path

import pytest

from djinn_zmq.probe import schema
from djinn_zmq.probe.fits import line
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, NotMeasured, Results, write
from djinn_zmq.probe.samples import Samples, ratio

COMMITTED = sorted((Path(__file__).parents[2] / "bench" / "results").rglob("*.json"))


@pytest.fixture
def path(tmp_path) -> Path:
    samples = [Samples.of(f"at {n}", [1.0, 2.0, 3.0], {"layer": n}) for n in (1, 2, 3)]
    results = Results("test", this_machine(), {"samples": 3}, samples=samples)
    results.ratios = [ratio(*samples[:2], limit=2.0)]
    results.fits = [line("flat", dict(enumerate(samples)))]
    results.checks = [Check("bits equal", True, "3 of 3")]
    results.not_measured = [NotMeasured("the lane", "not there")]
    results.tables = {"memory": [{"at": "start", "n": 1}]}
    write(results, tmp_path / "out.json")
    return tmp_path / "out.json"


def test_what_is_written_is_valid_and_reads_back(path):
    found = schema.read(path)
    assert found.samples[1].labels == {"layer": 2} and found.fits[0].flat
    assert found.not_measured[0].why == "not there"
    again = Samples.from_json(json.loads(path.read_text())["samples"][0])
    assert again.median_s == 2.0 and again.labels == {"layer": 1}


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("samples", 0, "n"), 4, "n is 4, there are 3 samples"),
        (("samples", 0, "n"), None, "Expected `int`"),
        (("samples", 0, "samples"), [[1.0], [-2.0], [3.0]], "below zero"),
        (("samples", 0, "unit"), "ms", "Invalid enum value"),
        (("fits", 0, "flat"), False, "its interval says otherwise"),
        (("tables", "memory", 0, "n"), 0, "without its n"),
        (("versions",), {}, "versions lack"),
        (("schema",), 99, "schema 99"),
        (("machine", "speed"), 3, "unknown field"),
    ],
)
def test_a_file_that_says_something_else_than_its_samples_is_refused(path, where, value, complaint):
    found = json.loads(path.read_text())
    place = found
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=complaint):
        schema.read(path)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_are_valid_and_small(path):
    if "capabilities" not in path.name:
        assert schema.read(path).versions["djinn_zmq"]
    assert path.stat().st_size < 300_000


def test_there_is_a_json_schema_for_other_programs():
    document = schema.json_schema()
    assert "$defs" in document and str(schema.SCHEMA) in document["title"]
