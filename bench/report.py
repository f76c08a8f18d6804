"""What the resume experiment's samples say: fits, ratios, checks; on the terminal and as files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from bench import bare, eager, saving
from bench.writing import AFTER_NUMPY, ALONE, BEFORE, FIRST, WITH_EDIT
from djinn_zmq.probe import fits, tables
from djinn_zmq.probe.results import Check, Results, write
from djinn_zmq.probe.samples import Ratio, Samples, ratio

FILES = {
    "recompute": "recompute_latency.json",
    "manual_offload": "manual_offload_latency.json",
    "djinn": "djinn_resume_latency.json",
}
MERGED = "resume_latency.json"
OFFLOAD = "hidden state, preallocated"
# Targets on a GPU, as ratios to the manual offload (ready) and to the model's own layers (logits).
READY_LIMITS = {
    ("none", "device", ALONE): 0.5,
    ("none", "host", ALONE): 1.6,
    ("row_in_place", "device", WITH_EDIT): 1.0,
    ("in_place", "device", ALONE): 1.6,
    ("in_place", "device", AFTER_NUMPY): 1.6,
}  # by the lane: (edit, tier, what is timed)
# To an offload that writes as well, and on the same side of the clock.
ALIKE = {ALONE: BEFORE, WITH_EDIT: FIRST}
ALIKE_LIMIT = 1.6
LOGITS_LIMIT = 1.02
SAVING_LIMITS = {saving.ONE: 1.01, saving.ALL: 1.03}
# Over plain ipc: at most one bare round trip, and this.
PLAIN, PLAIN_S = ("ipc", "ready", "none"), 1e-4
EVERYWHERE = ("lane", "none", "device")
EVEN = 0.1  # of the median of all layers: as far as the median of one may lie from it


def add_findings(results: Results) -> None:
    """Fits of everything that has a layer, ratios to what it is compared with, and the two checks
    that the experiment is about: recompute rises with depth, a resume does not."""
    by_variant: dict[tuple[str, str, str], dict[int, Samples]] = {}
    for one in results.samples:
        label = one.labels
        if label["layer"] is not None:
            key = (label["baseline"], label["variant"], label["clock"])
            by_variant.setdefault(key, {})[label["layer"]] = one
    found = {}
    for (baseline, variant, clock), samples in by_variant.items():
        if len(samples) >= 3:
            on = "" if clock == "host" else f" ({clock} time)"
            found[baseline, variant, clock] = fits.line(f"{baseline}: {variant}{on}", samples)
    results.fits = list(found.values())
    results.ratios = _ratios(results, by_variant)
    kept = [one for one in results.checks if "bits" in one.what]
    results.checks = kept + _checks(found, by_variant, _has_targets(results))


def _has_targets(results: Results) -> bool:
    """Those of a GPU; and they are meant for ends that sleep while nobody speaks."""
    return results.settings.get("device") != "cpu" and not results.settings.get("spin_us")


def _ratios(results: Results, by_variant: dict) -> list[Ratio]:  # type: ignore[type-arg]
    on_gpu = _has_targets(results)
    offload = by_variant.get(("manual_offload", OFFLOAD, "host"), {})
    alike = {
        timed: by_variant.get(("manual_offload", f"{OFFLOAD}, {written}", "host"), {})
        for timed, written in ALIKE.items()
    }
    rest = by_variant.get(("eager", eager.REST, "host"), {})
    single = {one.name: one for one in results.samples if one.labels["layer"] is None}
    trip = single.get(f"{bare.NAME}: {bare.IPC}")
    found = []
    for (baseline, _, _), samples in by_variant.items():
        if baseline != "djinn":
            continue
        for layer, one in samples.items():
            label = one.labels
            if label["end"] == "ready" and layer in offload:
                targeted = on_gpu and label["transport"] == "lane"
                what = label["edit"], label["tier"], label["timed"]
                limit = READY_LIMITS.get(what) if targeted else None
                name = f"{one.name} / manual offload"
                found.append(ratio(one, offload[layer], name=name, limit=limit))
                timed = label["timed"]
                if label["edit"] == "in_place" and layer in alike.get(timed, {}):
                    limit = ALIKE_LIMIT if targeted else None
                    name = f"{one.name} / manual offload, {ALIKE[timed]}"
                    found.append(ratio(one, alike[timed][layer], name=name, limit=limit))
            elif label["end"] == "logits" and label["edit"] == "none" and layer in rest:
                name = f"{one.name} / the model's own layers"
                limit = LOGITS_LIMIT if on_gpu else None
                found.append(ratio(one, rest[layer], name=name, limit=limit))
            if trip and (label["transport"], label["end"], label["edit"]) == PLAIN:
                above = Samples(trip.name, trip.seconds + PLAIN_S)
                name = f"{one.name} / a ZMQ ipc round trip and {PLAIN_S * 1e3:g} ms"
                found.append(ratio(one, above, name=name, limit=1.0))
    return found + _of_saving(single, on_gpu)


def _of_saving(single: dict[str, Samples], on_gpu: bool) -> list[Ratio]:
    """A run that keeps checkpoints, over one that keeps none and over the plain model's."""
    without = {
        "one that saves nothing": single.get(f"{saving.NAME}: {saving.NOTHING}"),
        "the plain model's forward": single.get(f"{eager.NAME}: {eager.FORWARD}"),
    }
    return [
        ratio(
            single[f"{saving.NAME}: {kept}"],
            other,
            name=f"run, saving {kept} / {what}",
            limit=limit if on_gpu else None,
        )
        for kept, limit in SAVING_LIMITS.items()
        for what, other in without.items()
        if other is not None and f"{saving.NAME}: {kept}" in single
    ]


def _checks(found: dict, by_variant: dict, on_gpu: bool) -> list[Check]:  # type: ignore[type-arg]
    checks = []
    rising = found.get(("recompute", "to layer N", "host"))
    if rising is not None:
        checks.append(Check("recompute rises with depth", rising.rises, str(rising)))
    for key, fit in found.items():
        first = next(iter(by_variant[key].values())).labels
        if key[0] == "djinn" and first["end"] == "ready":
            checks.append(
                Check(
                    f"{fit.name} is flat",
                    fit.flat,
                    f"{fit}; largest over smallest median {fit.spread:.2f}",
                )
            )
            if on_gpu and (first["transport"], first["edit"], first["tier"]) == EVERYWHERE:
                checks.append(_even(fit.name, by_variant[key]))
    return checks


def _even(name: str, by_layer: dict[int, Samples]) -> Check:
    medians = np.array([one.median_s for one in by_layer.values()])
    off = medians / np.median(medians) - 1
    n = sum(one.n for one in by_layer.values())
    return Check(
        f"{name} takes the same at every layer, within {EVEN:.0%}",
        bool(abs(off).max() <= EVEN),
        f"{off.min():+.1%} to {off.max():+.1%} of {np.median(medians) * 1e3:.3g} ms, n = {n}",
    )


def write_all(results: Results, folder: Path) -> None:
    """A file for each of the prototype's three, and one with everything."""
    for baseline, name in FILES.items():
        samples = [one for one in results.samples if one.labels["baseline"] == baseline]
        if samples:
            write(_part(results, baseline, samples), folder / name)
    write(results, folder / MERGED)


def _part(results: Results, baseline: str, samples: Sequence[Samples]) -> Results:
    ours = f"{baseline}:"
    return replace(
        results,
        bench=FILES[baseline].removesuffix(".json"),
        samples=list(samples),
        fits=[one for one in results.fits if one.name.startswith(ours)],
        ratios=[one for one in results.ratios if one.name.startswith(ours)],
        checks=[one for one in results.checks if baseline == "djinn" or ours in one.found],
        not_measured=[one for one in results.not_measured if baseline in one.what],
        tables=results.tables if baseline == "djinn" else {},
    )


def show(results: Results) -> None:
    click.echo("\n" + tables.of_samples("all cases", results.samples, "ms"))
    if results.ratios:
        click.echo("\n" + tables.of_ratios("at the medians", results.ratios))
    click.echo()
    for fit in results.fits:
        click.echo(str(fit))
    click.echo()
    for check in results.checks:
        click.echo(str(check))
    for one in results.not_measured:
        click.echo(str(one))
