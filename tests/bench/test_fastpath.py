"""The fast path's table is put together from its parts, and says of every budget how it stands."""

import pytest
from click.testing import CliRunner

from bench import fastpath
from bench.budgets import Budget, into, line_of
from bench.parts import Part
from djinn_zmq.memory import shared
from djinn_zmq.probe import schema
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, NotMeasured, Results, write
from djinn_zmq.probe.samples import Samples, ratio
from djinn_zmq.settings import MIB


def file_with(path, ratios=(), checks=(), not_measured=()):
    results = Results("test", this_machine(), {})
    results.ratios, results.checks = list(ratios), list(checks)
    results.not_measured = list(not_measured)
    write(results, path)
    return schema.read(path)


def measured(name, above, below, limit=None):
    return ratio(Samples.of("a", above), Samples.of("b", below), name=name, limit=limit)


def test_a_budget_is_held_only_where_it_is_at_every_layer(tmp_path):
    found = file_with(
        tmp_path / "one.json",
        [measured(f"ready, layer {n} / x", [0.1 * n] * 4, [1.0] * 4, limit=0.5) for n in (1, 2, 9)],
    )
    budget = Budget("ready", "resume-0", "^ready, layer")
    line = line_of(budget, found, "")
    assert (line.verdict, line.target) == ("missed", "<= 0.5")
    assert line.cells == ["ready", "<= 0.5", "0.1 0.2 0.9", "4", "missed"]
    assert line_of(Budget("ready", "resume-0", "layer [12] "), found, "").verdict == "held"


def test_a_figure_beside_a_budget_has_no_verdict_whatever_it_is(tmp_path):
    found = file_with(
        tmp_path / "one.json", [measured("told / x", [9.0] * 2, [1.0] * 2, limit=1.6)]
    )
    line = line_of(Budget("told", "resume-0", "told /", told="<= 1.6"), found, "")
    assert line.cells == ["told", "(<= 1.6)", "9", "2", "-"]
    results = Results("test", this_machine(), {})
    into(results, [line])
    assert results.checks == [] and results.tables["budgets"][0]["held"] is None


def test_what_has_no_figure_is_not_measured_and_says_why(tmp_path):
    found = file_with(
        tmp_path / "one.json",
        [measured("swap in / x", [1.0] * 2, [1.0] * 2)],
        [Check("tokens right", True, "9 of 9")],
        [NotMeasured("ready, by lane, layer 3", "the lane broke")],
    )
    no_file = line_of(Budget("a", "swap", "swap out"), None, "its 3 s were over")
    assert (no_file.verdict, no_file.why) == ("not measured", "its 3 s were over")
    broken = line_of(Budget("a", "resume-0", "ready, by lane, layer .*", False), found, "")
    assert (broken.verdict, broken.why) == ("not measured", "the lane broke")
    assert line_of(Budget("a", "swap", "swap in /"), found, "").verdict == "no target here"
    assert line_of(Budget("a", "memory", "tokens right"), found, "").verdict == "held"


def test_the_stopped_sessions_get_no_more_host_memory_than_this_machine_has(tmp_path):
    asked = fastpath.Asked("tiny", "cpu", 8, (1,), 2, 40)
    options = fastpath.parts(asked, tmp_path)["memory"].options
    (given,) = (one for one in options if one.startswith("--host-memory="))
    assert 0 < int(given.partition("=")[2]) * MIB < shared.installed()


def test_a_part_that_fails_is_named_and_the_others_results_stay(tmp_path, monkeypatch):
    options = ("--samples=1", f"--json={tmp_path / 'import.json'}")
    made = {
        "noop": Part("no-op", "bench.there_is_none", (), 20),
        "import": Part("import", "bench.import_time", options, 60),
        "spin-noop": Part("no-op, spinning", "bench.noop", (), 60, cannot="too few CPUs"),
    }
    monkeypatch.setattr(fastpath, "parts", lambda asked, folder: made)
    ended = CliRunner().invoke(
        fastpath.main, ["--shape=tiny", "--device=cpu", "--parts=import", "--parts=noop",
                        "--parts=spin-noop", f"--out={tmp_path}"]
    )  # fmt: skip
    assert ended.exit_code == 1
    assert "not all there: no-op;" in ended.stderr and "there_is_none" in ended.stdout
    assert "no-op, spinning, not here: too few CPUs" in ended.stdout
    assert "figures" not in ended.stdout  # there is nothing to be drawn of these
    found = schema.read(tmp_path / "fastpath.json")
    judged = {one.what: one.held for one in found.checks}
    assert judged["import: client import, no torch"] is True
    missing = {one.what: one.why for one in found.not_measured}
    assert "there_is_none" in missing["noop: no-op by lane, back to back"]
    assert missing["swap: swap rate, in"] == "its part was not run"
    spinning = "spin-noop: no-op by lane, back to back: without, with --spin-us 200"
    assert missing[spinning] == "too few CPUs"
    assert {row["part"] for row in found.tables["times"]} == {"import"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parts=noop,swap"], "'noop,swap' is not one of 'resume-0', 'noop'"),
        (["--shape=huge", "--device=cpu"], '"huge"'),
        (["--device=cuda:77"], "no GPU here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(tmp_path, options, words):
    ended = CliRunner().invoke(fastpath.main, [*options, f"--out={tmp_path}"])
    assert ended.exit_code != 0 and words in ended.stderr
    assert not (tmp_path / "fastpath.json").exists()
