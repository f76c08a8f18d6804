"""The capabilities table: who can do what, and at which cost. Every cell is measured or cited.

A measured cell names its figure, its number of samples and the file's bench; a cited one its source:
a test of this repository that holds it, or the other project's own documentation. Where there is
neither, the cell says "not measured yet".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import published
from bench.cases import HIDDEN, PREALLOCATED, THEN
from djinn_zmq.probe import schema, tables
from djinn_zmq.probe.results import SCHEMA, write_json

FILE = "capabilities.json"
MARKDOWN = "capabilities.md"
COLUMNS = ("recompute", "manual offload", "eager, all kept", "nnsight", "prototype", "Djinn")
NOTHING = "not measured yet"
BY_HAND = f"{HIDDEN}, {PREALLOCATED}, {THEN}"  # the variant

Found = Mapping[str, Sequence[schema.File]]


@dataclass(frozen=True, slots=True)
class Cell:
    """text: for people. source: "measured: …, n = …" or "cited: …"; "" for nothing yet."""

    text: str
    source: str = ""


NOT_YET = Cell(NOTHING)


def cited(text: str, source: str) -> Cell:
    return Cell(text, f"cited: {source}")


# What follows from how the baseline is written can be read in its file.
BY_DESIGN = {
    "recompute": "bench/recompute.py",
    "manual offload": "bench/manual_offload.py",
    "eager, all kept": "bench/eager.py",
}
NNSIGHT = "nnsight 0.8 documentation"
PROTOTYPE = "the prototype's README, experiment 3"
NOT_STATED = cited("not stated", f"{PROTOTYPE}, which does not say")


def rows(found: Found) -> dict[str, dict[str, Cell]]:
    """The table: row → column → cell."""
    return {
        **_measured_rows(found),
        "unedited result equals the plain model's bits": {
            **{name: cited("yes: it is the plain model", file) for name, file in BY_DESIGN.items()},
            "nnsight": cited("yes: it runs the model's own forward", NNSIGHT),
            "prototype": NOT_STATED,
            "Djinn": _exact(found),
        },
        "program writes CUDA or bookkeeping of its own": {
            "recompute": cited("no", "bench/recompute.py"),
            "manual offload": cited("yes", "bench/manual_offload.py"),
            "eager, all kept": cited("a little: lists of tensors", "bench/eager.py"),
            "nnsight": cited("no", NNSIGHT),
            "prototype": cited("no", PROTOTYPE),
            "Djinn": cited("no", "README.md, ten lines"),
        },
        "pause, look, edit and go on within one forward": {
            "recompute": cited("no", "bench/recompute.py"),
            "manual offload": cited("by hand", "bench/manual_offload.py"),
            "eager, all kept": cited("by hand", "bench/eager.py"),
            "nnsight": cited("within a prepared trace; no live pause", NNSIGHT),
            "prototype": cited("yes", PROTOTYPE),
            "Djinn": cited("yes", "tests/end_to_end/test_first_pause.py"),
        },
        "many branches from one stop": {
            "recompute": cited("each from the start", "bench/recompute.py"),
            "manual offload": cited("by hand", "bench/manual_offload.py"),
            "eager, all kept": cited("by hand", "bench/eager.py"),
            "nnsight": cited("each a forward", NNSIGHT),
            "prototype": NOT_STATED,
            "Djinn": cited("yes", "tests/end_to_end/test_first_pause.py"),
        },
        "what was saved survives the death of its process": {
            **{name: cited("no: it is the same process", file) for name, file in BY_DESIGN.items()},
            "nnsight": cited("no: it is the same process", NNSIGHT),
            "prototype": NOT_STATED,
            "Djinn": cited("yes: kill -9 of the engine", "tests/end_to_end/test_failure.py"),
        },
        "others are served while one is stopped": {
            **{name: cited("no: one process, one user", file) for name, file in BY_DESIGN.items()},
            "nnsight": cited("no: one process, one user", NNSIGHT),
            "prototype": NOT_STATED,
            "Djinn": _others(found),
        },
        "edits travel as data, not as pickled code": {
            **{name: cited("nothing travels", file) for name, file in BY_DESIGN.items()},
            "nnsight": cited("locally nothing travels", NNSIGHT),
            "prototype": cited("pickled tensors", PROTOTYPE),
            "Djinn": cited("yes: typed edits", "docs/protocol.md"),
        },
    }


def _measured_rows(found: Found) -> dict[str, dict[str, Cell]]:
    table: dict[str, dict[str, Cell]] = {}
    for one in found.get("resume_latency", []):
        about = f"{one.settings.get('served')}, {one.settings.get('max_length')} tokens"
        if idle_ms := one.settings.get("idle_ms"):
            about += f", after {idle_ms:g} ms of idling"
        where = ", ".join(one.machine.gpus) or f"{one.machine.cores} CPUs"
        way = _fastest_way(one)
        ready = f"ready at layer N+1, first and last layer ({about}; {where})"
        table[ready] = {
            "recompute": _ends(one, "recompute", "to layer N"),
            "manual offload": _ends(one, "manual_offload", "hidden state, preallocated"),
            "eager, all kept": cited("0: it never left", "bench/eager.py"),
            "nnsight": cited("no such step: a forward each time", NNSIGHT),
            "prototype": cited(
                f"~{published.RESUME_MS[1]:g} ms, whole ({published.HARDWARE})", PROTOTYPE
            ),
            "Djinn": _ends(one, "djinn", f"{way}, to ready, edited none"),
        }
        table[f"growth with depth ({about}; {where})"] = {
            "recompute": _slope(one, "recompute: to layer N"),
            "manual offload": _slope(one, "manual_offload: hidden state, preallocated"),
            "eager, all kept": cited("none: nothing is done", "bench/eager.py"),
            "nnsight": _slope(one, "nnsight: steered forward"),
            "prototype": cited("none", PROTOTYPE),
            "Djinn": _slope(one, f"djinn: {way}, to ready, edited none"),
        }
        table[f"edit and go on to the logits, first and last layer ({about}; {where})"] = {
            "recompute": _ends(one, "eager", "whole forward"),
            "manual offload": _ends(one, "manual_offload", BY_HAND),
            "eager, all kept": _ends(one, "eager", "layers N+1..L and head"),
            "nnsight": _ends(one, "nnsight", "steered forward"),
            "prototype": cited(
                f"~{published.RESUME_MS[1]:g} ms, whole ({published.HARDWARE})", PROTOTYPE
            ),
            "Djinn": _ends(one, "djinn", f"{way}, to logits, edited none"),
        }
    return table


def _fastest_way(one: schema.File) -> str:
    ways = {sample.labels.get("transport") for sample in one.samples}
    return next((way for way in ("lane", "ipc", "tcp") if way in ways), "ipc")


def _ends(one: schema.File, baseline: str, variant: str) -> Cell:
    chosen = [
        sample
        for sample in one.samples
        if (sample.labels.get("baseline"), sample.labels.get("variant")) == (baseline, variant)
        and sample.labels.get("clock") == "host"
    ]
    if not chosen:
        return NOT_YET
    chosen.sort(key=lambda sample: -1 if sample.labels["layer"] is None else sample.labels["layer"])
    ms = [tables.number(sample.median * 1e3) for sample in (chosen[0], chosen[-1])]
    text = f"{ms[0]} ms" if len(chosen) == 1 else f"{ms[0]} … {ms[1]} ms"
    return Cell(text, f"measured: {one.bench}, n = {chosen[0].n} each")


def _slope(one: schema.File, name: str) -> Cell:
    for fit in one.fits:
        if fit.name == name:
            text = "flat" if fit.flat else f"{tables.number(abs(fit.slope) * 1e6)} us a layer"
            sign = "-" if fit.slope < 0 and not fit.flat else ""
            return Cell(sign + text, f"measured: {one.bench}, n = {fit.n}")
    return NOT_YET


def _exact(found: Found) -> Cell:
    for one in found.get("resume_latency", []):
        for check in one.checks:
            if "bits of the plain model" in check.what:
                return Cell(check.found, f"measured: {one.bench}, n = {check.found.split()[0]}")
    return cited("yes", "tests/engine/models/test_architectures.py")


def _others(found: Found) -> Cell:
    for one in found.get("memory_pressure", []):
        for check in one.checks:
            if check.what.startswith("a second client") and check.held is not None:
                return Cell(check.found, f"measured: {one.bench}, n = {check.found.split()[2]}")
    return cited("yes", "tests/end_to_end/test_first_pause.py")


def write(found: Found, into: Path) -> list[Path]:
    """The table as Markdown and as JSON. Returns the paths."""
    table = rows(found)
    value = {
        "schema": SCHEMA,
        "table": "capabilities",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "columns": list(COLUMNS),
        "rows": [
            {"row": name, "cells": [_as_json(cells[column]) for column in COLUMNS]}
            for name, cells in table.items()
        ],
    }
    write_json(value, into / FILE)
    (into / MARKDOWN).write_text(markdown(table))
    return [into / FILE, into / MARKDOWN]


def _as_json(cell: Cell) -> dict[str, Any]:
    return {"text": cell.text, "source": cell.source}


def markdown(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """Cells carry a number; below the table stands where each comes from."""
    sources: list[str] = []
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in table.items():
        texts = []
        for column in COLUMNS:
            cell = cells[column]
            if cell.source and cell.source not in sources:
                sources.append(cell.source)
            mark = f" [{sources.index(cell.source) + 1}]" if cell.source else ""
            texts.append(cell.text + mark)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    notes = [f"{place}. {source}" for place, source in enumerate(sources, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"
