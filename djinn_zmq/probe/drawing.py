"""Figures that can be read in grey, with their machine and sample counts on them.

What differs is told by shape as well as by shade: hatches for bars, markers and dashes for lines.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from djinn_zmq.errors import RequestError
from djinn_zmq.probe.ladder import Decomposition
from djinn_zmq.probe.results import Results
from djinn_zmq.probe.samples import Samples

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as exc:
    raise RequestError(
        "figures need matplotlib: pip install 'djinn-zmq[bench]', or leave them out"
    ) from exc

# From dark to light, so that a grey print keeps the order; no two neighbours share a hatch.
SHADES = ("#1b3a57", "#2f6690", "#3a8fb7", "#7fb7be", "#b9d6c2", "#dcd6a0", "#e8b96a", "#d98d4f")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")
DASHES = ("-", "--", "-.", ":")
DPI = 150


def distributions(title: str, samples: Sequence[Samples]) -> Figure:
    """A box a case: quartiles, whiskers at 5 and 95 %, the median's interval as a notch's line."""
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(samples)), layout="constrained")
    axes = figure.subplots()
    shown = list(samples)[::-1]
    axes.boxplot(
        [one.seconds.reshape(-1) * 1e6 for one in shown],
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        medianprops={"color": "black", "linewidth": 2},
    )
    axes.set_yticks(range(1, len(shown) + 1), [f"{one.name} (n = {one.n})" for one in shown])
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("microseconds (box: quartiles, whiskers: 5 and 95 %)")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_title(title)
    return figure


def stacked(title: str, bars: Mapping[str, Decomposition]) -> Figure:
    """A bar for each decomposition, a piece for each step; what is negative stands left of zero.

    Where layers and head take most of it, all the rest is drawn once more without them.
    """
    without = any(_share(found, "compute") > 0.5 for found in bars.values())
    panels = 2 if without else 1
    figure = Figure(figsize=(9.5, panels * (1.3 + 0.7 * len(bars)) + 0.8), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    styles: dict[str, int] = {}
    _stack(axes[0], bars, styles, ())
    axes[0].set_title(title)
    if without:
        _stack(axes[1], bars, styles, ("compute",))
        axes[1].set_title("the same without layers and head", fontsize=10)
    axes[-1].set_xlabel("microseconds; a thick line is the whole as the client's clock has it")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=8, loc="outside lower center")
    return figure


def _share(found: Decomposition, name: str) -> float:
    return sum(step.seconds for step in found.steps if step.name == name) / found.whole.median_s


def _stack(
    axes: Any, bars: Mapping[str, Decomposition], styles: dict[str, int], left_out: tuple[str, ...]
) -> None:
    furthest = 0.0
    for place, found in enumerate(bars.values()):
        ends = {True: 0.0, False: 0.0}  # of what is stacked to the right, and to the left
        for row in found.rows():
            step, value = str(row["step"]), float(row["seconds"]) * 1e6
            if step in ("whole", *left_out):
                continue
            style = styles.setdefault(step, len(styles))
            axes.barh(
                place,
                value,
                left=ends[value >= 0],
                height=0.6,
                color="white" if step == "rest" else SHADES[style % len(SHADES)],
                edgecolor="black",
                linewidth=0.6,
                hatch=HATCHES[(style + style // len(HATCHES)) % len(HATCHES)],
                label=step if step not in axes.get_legend_handles_labels()[1] else None,
            )
            ends[value >= 0] += value
        whole = found.whole.median_s * 1e6
        end = ends[True]
        note = f"  {end + ends[False]:,.0f} us"
        if not left_out:
            axes.plot([whole, whole], [place - 0.4, place + 0.4], color="black", linewidth=2.5)
            end = max(whole, end)
            note = f"  {whole:,.0f} us, n = {found.whole.n}; steps: {found.explained:.0%}"
        axes.annotate(note, (end, place), va="center", fontsize=8)
        furthest = max(furthest, end)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(min(0, axes.dataLim.x0 * 1.1), 1.35 * furthest)


def plain_numbers(axis: Any) -> None:
    """20, 50, 100 on a logarithmic axis, not 2 × 10¹."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path, results: Results | None = None) -> None:
    """Write *figure*; its machine stands above it, so that it stays with it wherever it goes."""
    if results is not None:
        head(figure, str(results.machine).splitlines()[0])
    figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata=_timeless(path))


def head(figure: Figure, text: str) -> None:
    figure.text(0.995, 1.01, text, fontsize=7, color="#444444", ha="right", va="bottom")


def _timeless(path: Path) -> dict[str, Any] | None:
    """No time of making in the file: the same results give the same bytes."""
    return {"CreationDate": None} if path.suffix == ".pdf" else None
