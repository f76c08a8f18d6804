"""Figures and the table from results that are committed, and from made-up ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import capabilities, plots
from djinn_zmq.errors import RequestError
from djinn_zmq.probe import schema
from djinn_zmq.probe.ladder import RESUME, Decomposition, Step
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.samples import Samples

LAYERS = (1, 2, 4)
PRESSURE = (
    Path(plots.__file__).with_name("results") / "experiment-2cores/memory-pressure-small.json"
)


def samples(baseline: str, variant: str, base_s: float, a_layer_s: float = 0.0) -> list[Samples]:
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal((4, 3))
    return [
        Samples(
            f"{baseline}: {variant}, layer {layer}",
            (base_s + a_layer_s * layer) * noise,
            {"baseline": baseline, "variant": variant, "layer": layer, "clock": "host"}
            | {"transport": "ipc", "end": "ready", "edit": "none"},
        )
        for layer in LAYERS
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Where figures and table are, and the names of the files that were written."""
    folder = tmp_path_factory.mktemp("results")
    found = Results("resume_latency", this_machine(), {"max_length": 8, "model": "tiny"})
    found.settings |= {"served": "tiny", "device": "cpu"}
    found.samples = [
        *samples("recompute", "to layer N", 1e-4, 1e-3),
        *samples("manual_offload", "hidden state, preallocated", 1e-6),
        *samples("djinn", "ipc, to ready, edited none", 5e-4),
    ]
    write(found, folder / "resume_latency.json")
    steps = (Step("raw socket", 1e-5, 9), Step("lane", -2e-6, 9), Step("compute", 9e-4, 9))
    whole = Samples.of(RESUME, np.full(9, 1e-3))
    ladder = Results("decompose", this_machine(), {"nbytes": 54, "to": "logits"}, samples=[whole])
    ladder.settings |= {"model": "tiny", "endpoint": "ipc"}
    ladder.tables["steps"] = Decomposition(steps, whole, 54).rows()
    write(ladder, folder / "decompose.json")
    written = plots.draw([folder], folder / "figures")
    return folder / "figures", {path.name for path in written}


def test_every_figure_is_written_as_pdf_and_png_and_the_table_as_markdown_and_json(drawn):
    folder, written = drawn
    assert written == {
        "figure7-resume-crossover-tiny-8.pdf",
        "figure7-resume-crossover-tiny-8.png",
        "decomposition.pdf",
        "decomposition.png",
        "capabilities.json",
        "capabilities.md",
    }
    assert all((folder / name).stat().st_size > 1000 for name in written)


@pytest.mark.parametrize(("slowest_s", "scale"), [(0.03, "linear"), (1.5, "log")])
def test_one_slow_resume_does_not_hide_how_the_others_differ(slowest_s, scale):
    found = schema.read(PRESSURE)
    for row, seconds in zip(
        found.tables["resumes"], [slowest_s, 0.003, *[0.02] * 99], strict=False
    ):
        row["seconds"] = seconds
    _, resumes = plots.virtualization(found).axes
    assert resumes.get_yscale() == scale


def test_every_cell_of_the_table_is_measured_or_cited_or_says_that_it_is_neither(drawn, tmp_path):
    folder, _ = drawn
    table = schema.read_capabilities(folder / capabilities.FILE)
    assert table.columns[-1] == "Djinn"
    cell = table.rows[0].cells[-1]
    assert "ms" in cell.text and cell.source == "measured: resume_latency, n = 12 each"
    text = (folder / capabilities.MARKDOWN).read_text()
    assert "| recompute | manual offload |" in text and "not measured yet" in text
    found = json.loads((folder / capabilities.FILE).read_text())
    found["rows"][0]["cells"][0]["source"] = "hearsay"
    (tmp_path / capabilities.FILE).write_text(json.dumps(found))
    with pytest.raises(ValueError, match="neither measured nor cited"):
        schema.read_capabilities(tmp_path / capabilities.FILE)


def test_a_folder_without_results_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(RequestError, match="no results to draw"):
        plots.draw([tmp_path], tmp_path)
