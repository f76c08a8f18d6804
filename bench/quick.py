"""All of the experiment, small: `make bench-quick`. Under five minutes on two cores.

Exit status 0 only if everything that has to be seen was seen; each finding is printed.
"""

import time
from pathlib import Path

import click

from bench import plots
from bench.parts import Part, run
from djinn_zmq.probe import command, schema
from djinn_zmq.probe.results import Check

HERE = Path(__file__).parent / "configs"
DEPTHS = ("tiny", "small")
MOST_S = 150.0  # a part


def parts(folder: Path) -> list[Part]:
    found = [
        Part(
            f"resume latency, {name}",
            "bench.resume_latency",
            (f"--config={HERE / name}.yaml", f"--output-dir={folder / name}", "--fresh"),
            MOST_S,
        )
        for name in DEPTHS
    ]
    for name, *options in (
        ("ipc",),
        ("tcp", "--transport=tcp"),
        ("ready", "--to=ready"),
        ("activation", "--transport=tcp", "--carry=activation", "--shape=small", "--positions=64"),
    ):
        path = folder / "decompose" / f"{name}.json"
        found.append(
            Part(f"decomposition, {name}", "tools.decompose", (f"--json={path}", *options), MOST_S)
        )
    found += [
        Part(
            f"tool {name}",
            f"tools.{name}",
            ("--samples=60", f"--json={folder / 'tools'}/{name}.json"),
            MOST_S,
        )
        for name in ("tcp", "zmq_echo", "noop", "resume")
    ]
    config = f"--config={HERE / 'memory-pressure-tiny.yaml'}"
    output = f"--output-dir={folder / 'memory-pressure'}"
    found.append(Part("memory pressure", "bench.memory_pressure", (config, output), MOST_S))
    return found


def checks(folder: Path) -> list[Check]:
    """What the results have to show: recompute rises, a resume does not, the steps add up, every
    file is valid."""
    found: list[Check] = []
    for name in DEPTHS:
        path = folder / name / "resume_latency.json"
        if not path.exists():
            found.append(Check(f"resume latency, {name}", False, "there are no results"))
            continue
        results = schema.read(path)
        by_what = [Check(one.what, one.held, f"{name}: {one.found}") for one in results.checks]
        flat = [one for one in by_what if one.what.endswith("is flat")]
        found += [one for one in by_what if one not in flat]
        # The first is the question asked; that each of the others is flat as well is told by the run.
        found += flat[:1]
    for path in sorted((folder / "decompose").glob("*.json")):
        found += [
            Check(f"{one.what} ({path.stem})", one.held, one.found)
            for one in schema.read(path).checks
        ]
    return found


def valid(folder: Path) -> Check:
    paths = sorted(folder.rglob("*.json"))
    for path in paths:
        try:
            if path.name == "capabilities.json":
                schema.read_capabilities(path)
            else:
                schema.read(path)
        except ValueError as exc:
            return Check("every file is valid", False, str(exc))
    return Check("every file is valid", bool(paths), f"{len(paths)} files")


def drawn(folder: Path) -> Check:
    try:
        written = plots.draw([folder], folder / "figures")
    except Exception as exc:  # noqa: BLE001  a drawing library's own; told as what it is
        return Check("figures are made", False, f"{type(exc).__name__}: {exc}")
    pictures = [path for path in written if path.suffix in plots.FORMATS]
    return Check("figures are made", len(pictures) >= 8, f"{len(pictures)} in {folder / 'figures'}")


@click.command(cls=command.Tool)
@click.option("--output-dir", "folder", type=click.Path(path_type=Path, file_okay=False),
              default=Path("bench-quick"), show_default=True, help="Where everything goes.")  # fmt: skip
def main(folder: Path) -> None:
    """The whole experiment on `tiny` and on a small random shape: every baseline, the decomposition,
    memory pressure, the latency tools, the figures and the table."""
    begin = time.monotonic()
    folder = folder.resolve()
    for name in ("decompose", "tools", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    outcome = []
    for place, part in enumerate(parts(folder)):
        outcome.append(run(part, MOST_S, folder / "logs" / f"{place:02}-{part.module}.log"))
        click.echo(str(outcome[-1]))
    for check in (*checks(folder), drawn(folder), valid(folder)):
        outcome.append(check)
        click.echo(str(check))
    click.echo(f"\n{time.monotonic() - begin:.0f} s, everything in {folder}")
    missed = [one for one in outcome if not one.held]
    if missed:
        raise click.ClickException(f"{len(missed)} of {len(outcome)} did not hold")


if __name__ == "__main__":
    main(prog_name="python -m bench.quick")
