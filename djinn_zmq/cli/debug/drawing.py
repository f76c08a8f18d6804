"""What the debugger shows: tables, bars, and heat maps of layers by tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from djinn_zmq.client.looks import Top

BAR = 24
CELL = 12  # characters of a heat map's cell
SHADES = ("grey11", "#12263a", "#15405e", "#1b6181", "#2e8b8b", "#57b06f", "#a6cf52", "#f4e04d")
DARK = 5  # shades from here on are light: write dark on them


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()
) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    for place, head in enumerate(heads):
        out.add_column(head, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def tops(found: Sequence[Top], before: Sequence[float] | None = None) -> Table:
    """Candidates with bars. before: how likely each was in what they are compared with."""
    heads = ["token", "id", "probability", ""] + (["before"] if before is not None else [])
    rows = []
    for place, top in enumerate(found):
        row: list[Any] = [
            Text(shown(top.token), style="bold"),
            top.id,
            f"{top.probability:.4f}",
            bar(top.probability, "green"),
        ]
        if before is not None:
            row.append(f"{before[place]:.4f}")
        rows.append(row)
    return table(heads, rows, right=(1, 2, 4))


def bar(share: float, style: str) -> Text:
    """As long as *share* says, 0 to 1; none of NaN, which is what one is after mostly."""
    return Text("█" * round(BAR * min(1.0, max(0.0, share))), style=style)


def shown(token: str, number: Any = "") -> str:
    """A token's text where it can be seen."""
    text = token.strip().replace("\n", "\\n").replace("\t", "\\t")
    return text or (repr(token) if token else str(number))


def cut(text: str, width: int = CELL) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def shade(share: float) -> str:
    """The style of a cell: share from 0 to 1."""
    level = min(len(SHADES) - 1, int(max(0.0, share) * len(SHADES)))
    return f"{'black' if level >= DARK else 'white'} on {SHADES[level]}"


def heat(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str], Sequence[float], bool]],
    width: int,
    *,
    corner: str = "layer",
    note: str = "",
) -> RenderableType:
    """A heat map. rows: (label, cells, shares, marked). corner: what the labels are. width: of the
    terminal; where not all columns fit the last ones are shown, and it says so."""
    label = max([len(row[0]) for row in rows] + [5]) + 2
    cell = max([min(CELL, len(text)) for row in rows for text in row[1]] + [4]) + 1
    titled = max(cell, *(min(CELL, len(head)) + 1 for head in heads))
    if titled * len(heads) <= width - label - 2:  # else rather more columns than whole titles
        cell = titled
    fit = max(1, (width - label - 2) // cell)
    first = max(0, len(heads) - fit)
    lines = [_line(corner, heads[first:], [None] * len(heads), label, cell, "bold cyan")]
    for name, texts, shares, marked in rows:
        style = "bold yellow" if marked else "dim"
        lines.append(
            _line(
                f"▶ {name}" if marked else name, texts[first:], shares[first:], label, cell, style
            )
        )
    hidden = f"{first} of {len(heads)} positions to the left are not shown" if first else ""
    words = "; ".join(filter(None, (note, hidden)))
    return Group(*lines, *([Text(words, style="dim")] if words else []))


def _line(
    name: str,
    texts: Sequence[str],
    shares: Sequence[float | None],
    label: int,
    cell: int,
    style: str,
) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    line.append(name.rjust(label - 1) + " ", style=style)
    for text, share in zip(texts, shares, strict=False):
        body = cut(text, cell - 1).ljust(cell)
        line.append(body, style="bold cyan" if share is None else shade(share))
    return line


def path(layers: int, at: int, inside: str, breaks: Sequence[int]) -> Text:
    """The model as a line: what has run, where it stands, what is to come."""
    line = Text()
    for layer in range(layers + 1):
        done = layer <= at
        mark = "●" if layer in breaks else "•"
        here = layer == at
        style = "bold yellow" if here else "green" if done else "dim"
        line.append(
            f"▶{layer}" if here else mark, style="red" if mark == "●" and not here else style
        )
        if layer < layers:
            line.append("╌╌" if here and inside else "──", style="green" if layer < at else "dim")
    if inside:
        line.append(f"  in {inside}", style="bold yellow")
    return line


def numbers(array: np.ndarray, width: int) -> str:
    """An array, small enough to read, in lines of *width* characters."""
    return np.array2string(
        np.asarray(array, np.float32),
        max_line_width=width,
        precision=4,
        threshold=64,
        edgeitems=4,
        suppress_small=True,
    )
