"""The resume experiment runs end to end on `tiny`. What it finds is not asserted, but that it finds
everything it was asked for, or says by name what it could not."""

import json
import os
import runpy
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner, Result

import djinn_zmq as djinn
from bench import manual_offload, report, resume_latency
from bench.budgets import budgets, line_of
from bench.cases import Timed
from bench.djinn_resume import Variant
from bench.plain import Plain
from bench.writing import AFTER_NUMPY, ALONE, BEFORE, FIRST, WITH_EDIT
from djinn_zmq.probe import schema, serving
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.samples import Samples
from djinn_zmq.probe.serving import own_server, sockets_folder

UNTOUCHED = "ready, all rewritten in place, the resume alone, over untouched memory"
ALIKE = "… over memory written alike before the clock"
BY_NUMPY = "… written by one thread (numpy), over untouched memory"
TINY = ("--model=tiny", "--device=cpu", "--max-length=6", "--warmup=0", "--per-turn=1")


pytestmark = pytest.mark.usefixtures("unpinned")


def run(*options: str) -> Result:
    return CliRunner().invoke(resume_latency.main, [*TINY, *options])


@pytest.fixture(scope="module")
def tiered():
    """A server as the experiment starts it for itself, with all tiers. The last test kills it."""
    with sockets_folder() as folder, sockets_folder() as state:
        tiers = resume_latency.tier_options("cpu", state)
        with own_server(folder, "--threads=1", *tiers) as one:
            yield one


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiered):
    """Everything, measured once: where it is, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run("--repeat=2", "--layers", "1", "2", "4", f"--server={tiered.ipc}",
                f"--output-dir={folder}")  # fmt: skip
    assert ended.exit_code == 0, ended.output
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
    assert all(one.n == 2 for one in found.samples)
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
    monkeypatch.setitem(djinn.connect.__kwdefaults__, "timeout_s", 1.0)  # nobody to wait for
    server = () if any("--server" in one for one in options) else (f"--server={served.ipc}",)
    ended = run(*server, *options, f"--output-dir={tmp_path}")
    assert ended.exit_code == 1 and ended.exception.__class__ is SystemExit
    assert words in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "resume_latency.json").exists()


def test_a_wrong_key_in_the_file_is_named_with_those_that_are_allowed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: tiny\nlayrs: [1]\n")
    ended = CliRunner().invoke(resume_latency.main, [f"--config={path}"])
    assert ended.exit_code == 1
    assert 'there is no key "layrs": allowed are baselines' in ended.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_each_baseline_is_a_command_of_its_own_on_the_device_of_the_named_server(
    tmp_path, served, monkeypatch
):
    options = [one for one in TINY if one != "--device=cpu"]
    asked = [*options, "--repeat=2", "--layers", "1", "2", "3", f"--server={served.tcp}"]
    monkeypatch.setattr(sys, "argv", ["recompute", *asked, f"--output-dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.recompute", run_name="__main__")  # `python -m bench.recompute`
    assert ended.value.code == 0
    found = json.loads((tmp_path / "recompute_latency.json").read_text())
    assert {one["labels"]["baseline"] for one in found["samples"]} == {"recompute"}
    assert found["settings"]["device"] == "cpu"
    assert not (tmp_path / "djinn_resume_latency.json").exists()


def test_where_no_server_is_named_it_starts_one_with_all_tiers_on_its_device(
    tmp_path, served, monkeypatch
):
    started = []

    @contextmanager
    def lent(folder, *more, **options):
        started.append((more, options))
        yield served

    monkeypatch.setattr(serving, "own_server", lent)
    ended = run("--repeat=1", "--layers=1", "--baselines=recompute", f"--output-dir={tmp_path}")
    assert ended.exit_code == 0, ended.output
    ((more, options),) = started
    assert {"--threads=1", "--spin-us=0", "--gpu-memory=256"} < set(more)
    assert any(one.startswith("--state=") for one in more)
    assert options == {"model": "tiny", "shape": None, "device": "cpu", "dtype": "auto"}
    assert schema.read(tmp_path / "resume_latency.json").pinned[1].who == "servers"


def test_a_server_that_is_killed_costs_a_round_and_the_same_command_goes_on(
    tmp_path, served, tiered
):
    options = ("--baselines", "djinn", "recompute", "--edits", "none", "--layers", "1", "2",
               "--ends", "ready", "--tiers", "host", f"--output-dir={tmp_path}")  # fmt: skip
    kept = tmp_path / "rounds.jsonl"

    def kill_after_three_rounds() -> None:
        limit = time.monotonic() + 60
        while not (kept.exists() and kept.read_text().count('"round"') > 2):
            assert time.monotonic() < limit
            time.sleep(0.01)
        os.kill(tiered.pids[0], signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_after_three_rounds)
        ended = run(*options, "--repeat=100000", f"--server={tiered.ipc}")
        killed.result()
    assert ended.exit_code == 1 and ended.exception.__class__ is SystemExit
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: the server is gone in mid-benchmark") and str(kept) in last
    partial = schema.read(tmp_path / "resume_latency.json")
    done = partial.settings["rounds_taken"]
    assert done >= 3 and partial.not_measured[-1].why == "the run was interrupted"

    ended = run(*options, f"--repeat={done + 2}", f"--server={served.ipc}")
    assert ended.exit_code == 0, ended.output
    assert f"going on after {done} of {done + 2} rounds" in ended.stdout
    whole = schema.read(tmp_path / "resume_latency.json")
    assert whole.settings["rounds_taken"] == done + 2 and whole.settings["sittings"] == 2
    assert whole.samples[0].samples[:done] == partial.samples[0].samples
