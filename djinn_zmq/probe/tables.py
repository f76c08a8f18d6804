"""Aligned tables for terminals. A figure is never printed without its number of samples."""

from collections.abc import Sequence

from djinn_zmq.probe.samples import CONFIDENCE, Ratio, Samples

UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text under *columns*: the first one to the left, all others to the right."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def of_samples(title: str, samples: Sequence[Samples], unit: str = "us") -> str:
    """Median with its interval, p90, p99 and n of each. unit: "us", "ms" or "s"."""
    factor = UNITS[unit]
    rows = []
    for one in samples:
        low, high = one.interval_s()
        times = [one.median_s, low, high, one.p90_s, one.p99_s]
        rows.append([one.name, *(number(value * factor) for value in times), str(one.n)])
    percent = f"{CONFIDENCE:.0%}"
    columns = [f"{title}, {unit}", "p50", f"{percent} from", "to", "p90", "p99", "n"]
    return aligned(columns, rows)


def of_ratios(title: str, ratios: Sequence[Ratio]) -> str:
    """Each ratio with its interval, the samples above/below the line, and its target."""
    rows = []
    for one in ratios:
        target = "" if one.limit is None else f"{'>=' if one.at_least else '<='} {one.limit:g}"
        verdict = {None: "", True: "held", False: "missed"}[one.held]
        low, high = one.interval
        counts = "/".join(str(n) for n in one.n)
        values = [f"{value:.2f}" for value in (one.value, low, high)]
        rows.append([one.name, *values, counts, target, verdict])
    columns = [title, "ratio", f"{CONFIDENCE:.0%} from", "to", "n", "target", ""]
    return aligned(columns, rows)


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
