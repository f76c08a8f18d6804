"""The experiment's figures and table from files of results: `python -m bench.plots DIR...`

    figure7   resume-crossover          latency over depth: ready at layer N+1, and to the logits
    figure6   memory-virtualization     memory over stopped sessions, and what resuming them takes
              decomposition             the ladder, stacked
    table     capabilities              every cell measured here or cited (Markdown and JSON)

Each as PDF and PNG, legible in grey: lines differ by marker and dash, bars by hatch.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import capabilities, published
from djinn_zmq.errors import RequestError
from djinn_zmq.probe import command, drawing, schema
from djinn_zmq.probe.ladder import Decomposition, Step
from djinn_zmq.probe.samples import Samples

FORMATS = (".pdf", ".png")
MIB = 1 << 20
APART = 20  # times the median: a resume that took so long has all drawn on a logarithmic axis

# What is drawn in figure 7: (baseline, beginning of the variant) → (label, shade, marker, dash)
READY = {
    ("recompute", "to layer N"): ("recompute layers 0..N", "#1b3a57", "o", "-"),
    ("manual_offload", "hidden state, preallocated"): (
        "manual offload, hidden state", "#8a8a8a", "v", "--",
    ),
    ("manual_offload", "hidden state and KV, preallocated"): (
        "manual offload, hidden state and KV", "#8a8a8a", "^", ":",
    ),
    ("djinn", "lane, to ready, edited none"): ("Djinn, lane", "#c1440e", "D", "-"),
    ("djinn", "ipc, to ready, edited none"): ("Djinn, ipc", "#d98d4f", "s", "-."),
    ("djinn", "tcp, to ready, edited none"): ("Djinn, tcp", "#e8b96a", "P", "--"),
    ("prototype", "pickle, as it comes"): ("prototype's transport alone, pickle", "#6a8f5a", "X", ":"),
}  # fmt: skip
LOGITS = {
    ("nnsight", "steered forward"): ("nnsight, steered forward", "#6a5acd", "^", "-."),
    ("eager", "layers N+1..L and head"): ("plain model, layers N+1..L", "#1b3a57", "o", "-"),
    ("manual_offload", "hidden state, preallocated, then layers N+1..L and head"): (
        "manual offload, then the same layers",
        "#8a8a8a",
        "v",
        "--",
    ),
    ("djinn", "lane, to logits, edited none"): ("Djinn, lane", "#c1440e", "D", "-"),
    ("djinn", "ipc, to logits, edited none"): ("Djinn, ipc", "#d98d4f", "s", "-."),
    ("djinn", "tcp, to logits, edited none"): ("Djinn, tcp", "#e8b96a", "P", "--"),
}


# ---- figure 7


def crossover(found: schema.File) -> Figure:
    """Latency over depth on a logarithmic axis; bands are 95 % intervals of the median."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_variant = _by_variant(found)
    if not found.machine.gpus:
        where = "copy in host memory (no GPU)"
        ready, logits = (
            {
                key: (label.replace("manual offload", where), *style)
                for key, (label, *style) in drawn.items()
            }
            for drawn in (READY, LOGITS)
        )
    else:
        ready, logits = READY, LOGITS
    depths = sorted({layer for series in by_variant.values() for layer in series if layer >= 0})
    for axes, wanted in ((left, ready), (right, logits)):
        for key, style in wanted.items():
            if key in by_variant:
                _line(axes, by_variant[key], depths, style)
        axes.set_yscale("log")
        drawing.plain_numbers(axes.yaxis)
        axes.set_xticks(depths)
        axes.set_xlabel("layer N of the stop")
        axes.grid(which="major", alpha=0.35)
        axes.grid(which="minor", axis="y", alpha=0.12)
    left.set_ylabel("milliseconds")
    left.set_title("until layer N+1 can run")
    right.set_title("to the logits: layers N+1..L have to run")
    right.tick_params(labelleft=True)
    if found.settings.get("served") == published.MODEL:
        _published(left)
    for axes in (left, right):
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
            continue
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), frameon=False)
    figure.suptitle(f"Going on from layer N: {_about(found)}", fontsize=11)
    drawing.head(figure, machine_of(found))
    return figure


def _by_variant(found: schema.File) -> dict[tuple[str, str], dict[int, Samples]]:
    """Host-clock samples by (baseline, variant) and layer; -1 for those that have none."""
    series: dict[tuple[str, str], dict[int, Samples]] = {}
    for one in found.samples:
        label = one.labels
        if label.get("clock") == "host":
            layer = -1 if label["layer"] is None else label["layer"]
            samples = Samples.from_json({"name": one.name, "samples": one.samples})
            series.setdefault((label["baseline"], label["variant"]), {})[layer] = samples
    return series


def _line(
    axes: Axes, series: dict[int, Samples], depths: list[int], style: tuple[str, str, str, str]
) -> None:
    label, shade, marker, dash = style
    if list(series) == [-1]:  # it does not know of layers
        series = dict.fromkeys(depths, series[-1])
    layers = sorted(series)
    ms = [series[layer].median_s * 1e3 for layer in layers]
    bands = [series[layer].interval_s() for layer in layers]
    counts = sorted({series[layer].n for layer in layers})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    axes.plot(layers, ms, color=shade, marker=marker, linestyle=dash, markersize=6,
              label=f"{label} ({n})")  # fmt: skip
    low, high = zip(*((band.low * 1e3, band.high * 1e3) for band in bands), strict=True)
    axes.fill_between(layers, low, high, color=shade, alpha=0.25, linewidth=0)


def _published(axes: Axes) -> None:
    for name, points, marker in (
        ("recompute", published.RECOMPUTE_MS, "1"),
        ("manual offload", published.OFFLOAD_MS, "2"),
        ("resume, ~35 ms", published.RESUME_MS, "3"),
    ):
        axes.plot(
            list(points), list(points.values()), color="#b0b0b0", marker=marker, markersize=9,
            linestyle=(0, (1, 3)), linewidth=1, label=f"{name}: {published.HARDWARE}",
        )  # fmt: skip


# ---- figure 6


def virtualization(found: schema.File) -> Figure:
    """Memory over the experiment's course, and how long each resume took, by where it came from."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    rows = found.tables["timeline"]
    steps = range(len(rows))
    drawn = (
        ("gpu", "GPU memory, all of it", "#1b3a57", "-"),
        ("device", "device tier", "#2f6690", "--"),
        ("host", "host tier", "#d98d4f", "-."),
        ("disk", "disk tier", "#6a8f5a", ":"),
        ("kv_device", "keys and values on the device", "#8a8a8a", (0, (5, 1))),
        ("kv_host", "keys and values in host memory", "#b09ac0", (0, (3, 1, 1, 1, 1, 1))),
    )
    for name, label, shade, dash in drawn:
        values = [_bytes_of(row, name) for row in rows]
        if any(value for value in values):
            upper.plot(
                steps, [float("nan") if value is None else value / MIB for value in values],
                color=shade, linestyle=dash, linewidth=2, label=label, drawstyle="steps-post",
            )  # fmt: skip
    limits = [row.get("device_limit") for row in rows if row.get("device_limit")]
    if limits:
        upper.axhline(limits[0] / MIB, color="black", linewidth=1, linestyle=(0, (1, 2)),
                      label="the device's budget")  # fmt: skip
    turn = next(place for place, row in enumerate(rows) if row["phase"] == "resume")
    upper.axvspan(0, turn - 0.5, color="#000000", alpha=0.05)
    upper.set_title(f"Memory while sessions stop (shaded) and resume in another order: {_about(found)}",
                    fontsize=10)  # fmt: skip
    upper.set_xlabel(f"sessions stopped, then resumed (one sample each, n = {len(rows)})")
    upper.set_ylabel("MiB")
    upper.set_ylim(bottom=0)
    upper.legend(fontsize=8)
    upper.grid(alpha=0.3)
    _resumes(lower, found)
    drawing.head(figure, machine_of(found))
    return figure


def _bytes_of(row: dict[str, Any], name: str) -> int | None:
    if name == "kv_device":
        whole = row.get("kv")
        return None if whole is None else whole - row.get("kv_host", 0)
    return row.get(name)


def _resumes(axes: Axes, found: schema.File) -> None:
    styles = {"device": ("#2f6690", "o"), "host": ("#d98d4f", "s"), "disk": ("#6a8f5a", "^")}
    resumes = found.tables["resumes"]
    for tier, (shade, marker) in styles.items():
        chosen = [(place, row) for place, row in enumerate(resumes, 1) if row["tier"] == tier]
        if chosen:
            places, rows = zip(*chosen, strict=True)
            axes.plot(
                places, [row["seconds"] * 1e3 for row in rows], color=shade, marker=marker,
                linestyle="", markeredgecolor="black", markeredgewidth=0.4,
                label=f"from the {tier} tier (n = {len(rows)})",
            )  # fmt: skip
    evicted = sum(row["tier"] != "device" for row in resumes)
    tiers = any(row.get("device_limit") for row in found.tables["timeline"])
    note = f"{evicted} of {len(resumes)} were evicted" if tiers else "there is no device tier"
    axes.set_title(f"Resume, each session once: {note}", fontsize=10)
    axes.set_xlabel("in the order resumed")
    axes.set_ylabel("milliseconds")
    times = [row["seconds"] for row in resumes]
    # Else one would hide how the rest differ.
    if times and max(times) > APART * statistics.median(times):
        axes.set_yscale("log")
        drawing.plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


# ---- the decomposition


def decomposition(files: Iterable[schema.File]) -> Figure:
    bars = {}
    for found in files:
        where = found.settings
        to = "to the logits" if where["to"] == "logits" else "until ready"
        name = f"{where['model']}, {where['endpoint']}\n{to}, {where['nbytes']:,} B"
        bars[name] = _decomposition(found)
        machine = machine_of(found)
    figure = drawing.stacked("Where a resume's time goes", bars)
    drawing.head(figure, machine)
    return figure


def _decomposition(found: schema.File) -> Decomposition:
    rows = found.tables["steps"]
    whole = next(one for one in found.samples if one.name == "resume")
    steps = [
        Step(row["step"], row["seconds"], row["n"])
        for row in rows
        if row["step"] not in ("rest", "whole")
    ]
    return Decomposition(
        tuple(steps),
        Samples.from_json({"name": "resume", "samples": whole.samples}),
        found.settings["nbytes"],
    )


# ---- what they share


def machine_of(found: schema.File) -> str:
    machine = found.machine
    gpus = "".join(f", {gpu}" for gpu in machine.gpus)
    return f"{machine.cpu}, {machine.cores} cores{gpus}; djinn_zmq {found.versions['djinn_zmq']}"


def _about(found: schema.File) -> str:
    where = found.settings
    tokens = where.get("max_length") or where.get("context")
    idle = f", after {where['idle_ms']:g} ms of idling" if where.get("idle_ms") else ""
    name = where.get("served") or where.get("model")
    return f"{name}, {tokens} tokens, {where.get('device')}{idle}"


def read(folders: Iterable[Path]) -> dict[str, list[schema.File]]:
    """All files of results below *folders*, by the bench that made them."""
    found: dict[str, list[schema.File]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if path.name != capabilities.FILE:
                one = schema.read(path)
                found.setdefault(one.bench, []).append(one)
    return found


def draw(folders: Iterable[Path], into: Path) -> list[Path]:
    """Every figure that the results allow, and the table. Returns what was written."""
    found = read(folders)
    # What spins is measured beside these, and only where it matters: no depth is drawn of it.
    resumes = [one for one in found.pop("resume_latency", []) if not one.settings.get("spin_us")]
    if resumes:
        found["resume_latency"] = resumes
    figures: dict[str, Figure] = {}
    for one in found.get("resume_latency", []):
        figures[f"figure7-resume-crossover-{_slug(one)}"] = crossover(one)
    for one in found.get("memory_pressure", []):
        figures[f"figure6-memory-virtualization-{_slug(one)}"] = virtualization(one)
    if "decompose" in found:
        figures["decomposition"] = decomposition(found["decompose"])
    if not figures:
        raise RequestError(
            f"no results to draw in {', '.join(map(str, folders))}: run bench.resume_latency first"
        )
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for ending in FORMATS:
            drawing.save(figure, into / f"{name}{ending}")
            written.append(into / f"{name}{ending}")
    return written + capabilities.write(found, into)


def _slug(found: schema.File) -> str:
    where: dict[str, Any] = found.settings
    tokens = where.get("max_length") or where.get("context")
    idle = f"-idle-{where['idle_ms']:g}" if where.get("idle_ms") else ""
    return f"{str(where['model']).rpartition('/')[2]}-{tokens}{idle}"


@click.command(cls=command.Tool)
@click.argument("folders", nargs=-1, required=True,
                type=click.Path(path_type=Path, exists=True, file_okay=False))  # fmt: skip
@click.option("--into", type=click.Path(path_type=Path, file_okay=False),
              help="Where the figures go. [default: the first folder]")  # fmt: skip
def main(folders: tuple[Path, ...], into: Path | None) -> None:
    """Draw the experiment's figures and write the capabilities table from folders of results."""
    try:
        for path in draw(folders, into or folders[0]):
            click.echo(str(path))
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main(prog_name="python -m bench.plots")
