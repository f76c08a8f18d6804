"""A measurement that breaks off keeps what it has, and says why there is no more."""

import click
import pytest

from djinn_zmq.errors import LayerError, Lost
from djinn_zmq.probe import schema
from djinn_zmq.probe.interrupted import written
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results
from djinn_zmq.probe.rounds import Plan, interleaved


@pytest.fixture
def results():
    return Results("test", this_machine(), {})


def breaks_in_its_third_round(error):
    calls = []

    def call():
        calls.append(1)
        if len(calls) > 5:
            raise error

    return call


@pytest.mark.parametrize("error", [Lost("the server is gone"), ConnectionResetError("reset")])
def test_whole_rounds_are_written_when_the_server_goes(tmp_path, results, error):
    path = tmp_path / "out.json"
    said = pytest.raises(click.ClickException, match="gone in mid-benchmark.*out.json")
    with said, written(results, path):
        cases = {"a": breaks_in_its_third_round(error), "b": lambda: None}
        interleaved(cases, Plan(9, 2, warm_up=0, settle=0), into=results.samples)
    found = schema.read(path)
    assert [(one.name, one.n) for one in found.samples] == [("a", 4), ("b", 4)]
    assert found.not_measured[0].why == "the server is gone in mid-benchmark"


def test_ctrl_c_writes_as_well_and_stays_what_it_is(tmp_path, results, capsys):
    with pytest.raises(KeyboardInterrupt), written(results, tmp_path / "out.json"):
        case = {"a": breaks_in_its_third_round(KeyboardInterrupt())}
        interleaved(case, Plan(9, 2, warm_up=0, settle=0), into=results.samples)
    assert schema.read(tmp_path / "out.json").samples[0].n == 4
    assert "interrupted" in capsys.readouterr().err


def test_what_goes_wrong_before_anything_is_measured_is_raised_as_it_is(tmp_path, results):
    for error in (Lost("gone"), LayerError("no such layer")):
        with pytest.raises(type(error)), written(results, tmp_path / "out.json"):
            raise error
    assert not (tmp_path / "out.json").exists()


def test_without_a_file_that_nothing_is_kept_is_said(results):
    said = pytest.raises(click.ClickException, match="nothing is kept without --json")
    with said, written(results, None):
        case = {"a": breaks_in_its_third_round(Lost("gone"))}
        interleaved(case, Plan(9, 2, warm_up=0, settle=0), into=results.samples)
