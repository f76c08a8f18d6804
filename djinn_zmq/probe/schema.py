"""What a file of results must look like: `python -m djinn_zmq.probe.schema FILE...` checks some.

The types below are the schema; `--print` gives it as a JSON Schema document. A file that passes has
a machine, versions, and a sample count beside every figure that agrees with its samples.
"""

import math
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from djinn_zmq.probe.results import SCHEMA

Row = dict[str, Any]


class Machine(msgspec.Struct, forbid_unknown_fields=True):
    cpu: str
    cores: int
    memory: int
    kernel: str
    gpus: list[str]
    load: float


class Pinned(msgspec.Struct, forbid_unknown_fields=True):
    who: str
    processes: int
    threads: int
    cpus: list[int] | None


class Samples(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    unit: Literal["s"]
    n: int
    rounds: int
    median: float
    median_low: float
    median_high: float
    p90: float
    p99: float
    samples: list[list[float]]
    labels: Row = {}


class Ratio(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    value: float
    low: float
    high: float
    n: tuple[int, int]
    limit: float | None
    at_least: bool
    held: bool | None


class Fit(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    unit: Literal["s/layer"]
    slope: float
    low: float
    high: float
    at_zero: float
    r2: float
    n: int
    depths: list[int]
    spread: float
    flat: bool


class Check(msgspec.Struct, forbid_unknown_fields=True):
    what: str
    held: bool | None
    found: str


class NotMeasured(msgspec.Struct, forbid_unknown_fields=True):
    what: str
    why: str


class File(msgspec.Struct, forbid_unknown_fields=True):
    """One run of a benchmark or a tool."""

    schema: int
    bench: str
    taken_at: str
    machine: Machine
    versions: dict[str, str]
    settings: Row
    pinned: list[Pinned]
    samples: list[Samples]
    ratios: list[Ratio]
    tables: dict[str, list[Row]]
    fits: list[Fit] = []
    checks: list[Check] = []
    not_measured: list[NotMeasured] = []


class Cell(msgspec.Struct, forbid_unknown_fields=True):
    """source: "measured: …, n = …" or "cited: …"; empty only where nothing is known yet."""

    text: str
    source: str


class CellRow(msgspec.Struct, forbid_unknown_fields=True):
    row: str
    cells: list[Cell]


class Capabilities(msgspec.Struct, forbid_unknown_fields=True):
    """A table whose every cell is measured, cited, or said to be neither."""

    schema: int
    table: Literal["capabilities"]
    made_at: str
    columns: list[str]
    rows: list[CellRow]


def read_capabilities(path: Path) -> Capabilities:
    """Raises ValueError for what is no such table, or has a cell without a source."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Capabilities)
    except msgspec.DecodeError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    for row in found.rows:
        if len(row.cells) != len(found.columns):
            raise ValueError(
                f"{path}: {row.row}: {len(row.cells)} cells, {len(found.columns)} columns"
            )
        for cell in row.cells:
            known = cell.source.startswith("cited: ") or (
                cell.source.startswith("measured: ") and ", n = " in cell.source
            )
            if not known and cell.text != "not measured yet":
                raise ValueError(f'{path}: {row.row}: "{cell.text}" is neither measured nor cited')
    return found


def read(path: Path) -> File:
    """The results in *path*. Raises ValueError, with the place in the file, for what is none."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=File)
    except msgspec.DecodeError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    if found.schema != SCHEMA:
        raise ValueError(f"{path}: schema {found.schema}: this version reads {SCHEMA}")
    for problem in _problems(found):
        raise ValueError(f"{path}: {problem}")
    return found


def _problems(found: File) -> list[str]:
    """What the types do not say."""
    wrong = []
    for one in found.samples:
        if one.n != sum(map(len, one.samples)) or not one.n:
            wrong.append(
                f"{one.name}: n is {one.n}, there are {sum(map(len, one.samples))} samples"
            )
        if one.rounds != len(one.samples):
            wrong.append(f"{one.name}: {len(one.samples)} rounds, said to be {one.rounds}")
        if not all(second >= 0 for turn in one.samples for second in turn):
            wrong.append(f"{one.name}: a duration below zero")
        if not one.median_low <= one.median <= one.median_high:
            wrong.append(f"{one.name}: the median lies outside of its interval")
    for fit in found.fits:
        if fit.flat != (fit.low <= 0 <= fit.high):
            wrong.append(f"{fit.name}: flat is {fit.flat}, its interval says otherwise")
    for title, rows in found.tables.items():
        wrong += [f"table {title}: a row without its n: {row}" for row in rows if not _has_n(row)]
    if "djinn_zmq" not in found.versions or "python" not in found.versions:
        wrong.append("versions lack djinn_zmq or python")
    return wrong


def _has_n(row: Row) -> bool:
    n = row.get("n")
    counts = n if isinstance(n, list) else [n]
    return bool(counts) and all(isinstance(one, int) and one > 0 for one in counts)


def json_schema() -> dict[str, Any]:
    """The types above as a JSON Schema document."""
    return msgspec.json.schema(File) | {"title": f"djinn_zmq results, schema {SCHEMA}"}


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--print", "as_document", is_flag=True, help="Print the JSON Schema.")
def main(files: tuple[Path, ...], as_document: bool) -> None:
    """Check files of results against the schema."""
    if as_document:
        click.echo(msgspec.json.format(msgspec.json.encode(json_schema())).decode())
    for path in files:
        try:
            if msgspec.json.decode(path.read_bytes(), type=dict).get("table"):
                table = read_capabilities(path)
                click.echo(f"{path}: capabilities, {len(table.rows)} rows: valid")
                continue
            found = read(path)
        except (ValueError, msgspec.DecodeError) as exc:
            raise click.ClickException(str(exc)) from exc
        n = math.fsum(one.n for one in found.samples)
        click.echo(f"{path}: {found.bench}, {len(found.samples)} cases, {n:.0f} samples: valid")


if __name__ == "__main__":
    main(prog_name="python -m djinn_zmq.probe.schema")
