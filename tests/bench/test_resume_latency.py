"""The resume experiment runs end to end on `tiny`. What it finds is not asserted, but that it finds
everything it was asked for, or says by name what it could not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import djinn_zmq as djinn
from bench import manual_offload, report, resume_latency
from bench.budgets import budgets, line_of
from bench.cases import Timed
from bench.djinn_resume import Variant
from bench.plain import Plain
from bench.writing import AFTER_NUMPY, ALONE, BEFORE, FIRST, WITH_EDIT
from djinn_zmq.probe import schema
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.samples import Samples
from djinn_zmq.probe.serving import own_server, sockets_folder

ROOT = Path(__file__).parents[2]
UNTOUCHED = "ready, all rewritten in place, the resume alone, over untouched memory"
ALIKE = "… over memory written alike before the clock"
BY_NUMPY = "… written by one thread (numpy), over untouched memory"
TINY = ("--model=tiny", "--device=cpu", "--max-length=6", "--warmup=0", "--per-turn=1")


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "bench.resume_latency", *options]


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*options), cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )


@pytest.fixture(scope="module")
def served():
    with sockets_folder() as folder, own_server(folder, "--threads=1") as one:
        yield one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything, measured once: where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(*TINY, "--repeat=4", "--layers", "1", "2", "4", f"--output-dir={folder}")
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def test_every_baseline_is_measured_at_every_layer_or_named_with_the_reason(whole):
    folder, printed = whole
    found = schema.read(folder / "resume_latency.json")
    assert found.checks[0].held, "unedited resumes must equal the plain model's bits"
    cases = {(one.labels["baseline"], one.labels["layer"]) for one in found.samples}
    for baseline in ("recompute", "manual_offload", "eager", "djinn"):
        assert {(baseline, layer) for layer in (1, 2, 4)} <= cases
    assert ("prototype", None) in cases
    missing = " ".join(one.what for one in found.not_measured)
    measured = " ".join(one.name for one in found.samples)
    for wanted in ("nnsight", "lane", "from device", "from host", "from disk", "pinned"):
        assert wanted in missing or wanted in measured
    for timed in (ALONE, WITH_EDIT):
        assert f"edited in_place, {timed}" in measured
        assert f"djinn: lane, to ready, edited row_in_place, {timed}" in missing + measured
    assert f"edited in_place, {AFTER_NUMPY}" in measured
    assert f"row_in_place, {AFTER_NUMPY}" not in missing + measured
    assert all(one.n == 4 for one in found.samples)
    rising = [fit for fit in found.fits if fit.name == "recompute: to layer N"]
    assert rising[0].depths == [1, 2, 4] and "us a layer" in printed
    for name in ("recompute", "manual_offload", "djinn_resume"):
        part = schema.read(folder / f"{name}_latency.json")
        assert {one.labels["baseline"] for one in part.samples} == {name.removesuffix("_resume")}
    table = found.tables["spans: ipc, to logits, edited none"]
    assert "compute" in {row["span"] for row in table}


def test_every_budget_of_a_resume_finds_its_figures_and_writing_stands_on_both_sides(whole):
    found = schema.read(whole[0] / "resume_latency.json")
    lines = {one.name: line_of(one, found, "") for one in budgets(0)}
    bare = {name for name, line in lines.items() if not line.ratios}
    assert bare == {"… the same at every layer", "ready, a row edited in place, the edit timed",
                    "… the resume alone"} or found.machine.gpus  # fmt: skip
    below = {
        name: {one.name.partition(" / ")[2] for one in line.ratios} for name, line in lines.items()
    }
    assert below[UNTOUCHED] == {"manual offload"}
    assert below[ALIKE] == {f"manual offload, {BEFORE}"}
    assert below[BY_NUMPY] == {"manual offload"}
    told = [one.name for one in lines[BY_NUMPY].ratios]
    assert len(told) == 3 and all(AFTER_NUMPY in name for name in told)
    assert not any(AFTER_NUMPY in one.name for one in lines[UNTOUCHED].ratios)
    assert below["… writing timed on both sides"] == {f"manual offload, {FIRST}"}
    assert below["… writing timed on this side only"] == {"manual offload"}
    assert lines["… writing timed on this side only"].verdict == "-"


def test_a_resume_over_memory_written_alike_takes_nothing_off_that_over_untouched_memory(tmp_path):
    found = Results("resume_latency", this_machine(), {"device": "cuda:0"})

    def case(baseline, variant, ms, **more):
        labels = {"baseline": baseline, "variant": variant, "layer": 1, "clock": "host", **more}
        name = f"{baseline}: {variant}, layer 1"
        found.samples.append(Samples.of(name, [ms / 1e3] * 4, labels))

    case("manual_offload", report.OFFLOAD, 1)
    case("manual_offload", f"{report.OFFLOAD}, {BEFORE}", 2)
    for timed, ms in ((ALONE, 3), (AFTER_NUMPY, 1.5)):
        one = Variant("lane", "ready", "in_place", None, timed)
        case("djinn", str(one), ms, **one._asdict() | {"tier": "device"})
    report.add_findings(found)
    write(found, tmp_path / "one.json")
    kept = schema.read(tmp_path / "one.json")
    lines = {one.name: line_of(one, kept, "") for one in budgets(0)}
    assert lines[UNTOUCHED].cells == [UNTOUCHED, "<= 1.6", "3", "4", "missed"]
    assert lines[ALIKE].cells == [ALIKE, "<= 1.6", "1.5", "4", "held"]
    assert lines[BY_NUMPY].cells == [BY_NUMPY, "<= 1.6", "1.5", "4", "held"]


def test_an_offload_is_written_in_front_of_the_clock_or_on_it(monkeypatch):
    wrote = []
    monkeypatch.setattr(manual_offload, "rewriting", lambda there, data: lambda: wrote.append(1))
    plain = Plain("random:small", "auto", "cpu", np.array([[5, 6]]), 1)
    cases = {one.name: one for one in manual_offload.cases(plain, [1]) if isinstance(one, Timed)}
    before, first = (
        cases[f"manual_offload: {report.OFFLOAD}, {written}, layer 1"]
        for written in (BEFORE, FIRST)
    )
    before.before()
    assert len(wrote) == 1
    before.call()
    assert len(wrote) == 1 and first.before is None
    first.call()
    assert len(wrote) == 2


def test_a_server_that_is_killed_costs_a_round_and_the_same_command_goes_on(tmp_path, served):
    options = (*TINY, "--baselines", "djinn", "recompute", "--edits", "none", "--layers", "1", "2",
               "--ends", "ready", "--tiers", "host", f"--output-dir={tmp_path}")  # fmt: skip
    kept = tmp_path / "rounds.jsonl"
    with sockets_folder() as folder, own_server(folder, "--threads=1") as one:
        process = subprocess.Popen(
            command(*options, "--repeat=100000", f"--server={one.ipc}"),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        limit = time.monotonic() + 60
        while not (kept.exists() and kept.read_text().count('"round"') > 2):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.01)
        os.kill(one.pids[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("Error: the server is gone in mid-benchmark") and str(kept) in last
    assert "Traceback" not in said
    partial = schema.read(tmp_path / "resume_latency.json")
    done = partial.settings["rounds_taken"]
    assert done >= 3 and partial.not_measured[-1].why == "the run was interrupted"

    ended = CliRunner().invoke(
        resume_latency.main, [*options, f"--repeat={done + 2}", f"--server={served.ipc}"]
    )
    assert ended.exit_code == 0, ended.output
    assert f"going on after {done} of {done + 2} rounds" in ended.stdout
    whole = schema.read(tmp_path / "resume_latency.json")
    assert whole.settings["rounds_taken"] == done + 2 and whole.settings["sittings"] == 2
    assert whole.samples[0].samples[:done] == partial.samples[0].samples


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "5"], 'layer 5 does not exist: "tiny" has 4 layers (0-4)'),
        (["--server=127.0.0.1:1"], "no server answers at tcp://127.0.0.1:1"),
        (["--device=cuda:77"], 'no GPU here that this program can use for "cuda:77": say cpu'),
        (["--repeat=0"], "repeat is 0: it must be at least 1"),
        (["--config=no-such.yaml"], "no-such.yaml cannot be read: No such file or directory"),
        (["--model=nobody/nothing/never"], "nobody/nothing/never"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_measured(
    tmp_path, served, options, words, monkeypatch
):
    monkeypatch.setitem(djinn.connect.__kwdefaults__, "timeout_s", 0.2)  # nobody to wait for
    server = () if any("--server" in one for one in options) else (f"--server={served.ipc}",)
    ended = CliRunner().invoke(
        resume_latency.main, [*TINY, *server, *options, f"--output-dir={tmp_path}"]
    )
    assert ended.exit_code == 1 and ended.exception.__class__ is SystemExit
    assert words in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "resume_latency.json").exists()


def test_a_wrong_key_in_the_file_is_named_with_those_that_are_allowed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: tiny\nlayrs: [1]\n")
    ended = CliRunner().invoke(resume_latency.main, [f"--config={path}"])
    assert ended.exit_code == 1
    assert 'there is no key "layrs": allowed are baselines' in ended.stderr


def test_each_baseline_is_a_command_of_its_own_on_the_device_of_the_named_server(tmp_path, served):
    options = [one for one in TINY if one != "--device=cpu"]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.recompute", *options, "--repeat=2", "--layers", "1", "2", "3",
         f"--server={served.tcp}", f"--output-dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "recompute_latency.json").read_text())
    assert {one["labels"]["baseline"] for one in found["samples"]} == {"recompute"}
    assert found["settings"]["device"] == "cpu"
    assert not (tmp_path / "djinn_resume_latency.json").exists()
