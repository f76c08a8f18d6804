"""The whole experiment on one GPU, in one command of at most eight minutes: `python -m bench.gpu`.

A part that fails or runs out of its time is reported by name and the others go on; what was taken is
kept, drawn, and put into one archive.
"""

import time
from pathlib import Path

import click

from bench.parts import ROOT, Part, pack, run
from bench.plain import device_of
from djinn_zmq.probe import command
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import NotMeasured, Results, write
from djinn_zmq.probe.targets import Target

MEMORY = ROOT / "bench" / "configs" / "memory-pressure-llama-2-13b.yaml"
TO_DRAW_S = 40.0


def parts(
    shape: str, device: str, positions: tuple[int, ...], layers: tuple[int, ...], folder: Path
) -> list[Part]:
    """The experiment for each prompt's length first: it is what is wanted most."""
    found = []
    at = ("--layers", *map(str, layers)) if layers else ()
    for tokens in positions:
        options = (f"--model={shape}", f"--device={device}", f"--max-length={tokens}", *at,
                   "--warmup=2", "--repeat=4", "--per-turn=5",
                   f"--output-dir={folder / f'resume-{tokens}'}")  # fmt: skip
        found.append(Part(f"resume latency, {tokens} tokens", "bench.resume_latency", options, 200))
    on = (f"--shape={shape}", f"--device={device}", f"--positions={positions[0]}", "--no-pin")
    few = ("--samples=40", "--warmup=5")
    for name, *options in (
        ("logits",),
        ("ready", "--to=ready"),
        ("activation", "--carry=activation", "--transport=tcp"),
    ):
        path = f"--json={folder / 'decompose' / name}.json"
        found.append(
            Part(f"decomposition, {name}", "tools.decompose", (*on, *few, path, *options), 60)
        )
    for name in ("tcp", "zmq_echo"):
        path = f"--json={folder / 'tools' / name}.json"
        nbytes = "--nbytes=10557440"
        found.append(Part(f"tool {name}", f"tools.{name}", ("--samples=60", nbytes, path), 30))
    for idle in ("0", "2", "50"):
        path = f"--json={folder / 'tools' / f'noop-idle-{idle}'}.json"
        options = ("--samples=100", f"--idle-ms={idle}", "--no-pin", path)
        found.append(Part(f"tool noop, {idle} ms idle", "tools.noop", options, 40))
    memory = (f"--config={MEMORY}", f"--model={shape}", f"--device={device}",
              f"--context={positions[0]}", f"--output-dir={folder / 'memory-pressure'}")  # fmt: skip
    found.append(Part("memory pressure", "bench.memory_pressure", memory, 120))
    return found


@click.command(cls=command.Tool)
@click.option("--shape", default="llama-2-13b", show_default=True, help="Random weights of it.")
@click.option("--device", default="cuda:0", show_default=True, help='"cuda:N" or "cpu".')
@click.option("--positions", type=int, multiple=True, default=(1031, 2048), show_default=True,
              help="Tokens of the prompt; repeatable.")  # fmt: skip
@click.option("--layers", type=int, multiple=True, help="To stop at; repeatable. [default: five]")
@click.option("--minutes", type=click.FloatRange(0.5), default=8.0, show_default=True,
              help="The whole takes at most this long; what no time is left for is named.")  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False),
              default=Path("results-gpu"), show_default=True, help="Where everything goes.")  # fmt: skip
@click.option("--archive", type=Target(),
              help="All of it once more, as one .tar.gz.")  # fmt: skip
def main(
    shape: str,
    device: str,
    positions: tuple[int, ...],
    layers: tuple[int, ...],
    minutes: float,
    folder: Path,
    archive: Path | None,
) -> None:
    """Every baseline, figure and decomposition on one GPU: results, figures and table in one folder.

    \b
      python -m bench.gpu --out DIR --archive DIR.tar.gz
      python -m bench.gpu --shape small --device cpu --positions 64 --positions 128 --out DIR

    Exit status 0 where every part ran to its end and found what it is to find.
    """
    begin = time.monotonic()
    device_of(device)
    for name in ("decompose", "tools", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    machine = this_machine()
    settings = {"shape": shape, "device": device, "positions": list(positions), "minutes": minutes}
    results = Results("gpu", machine, settings)
    click.echo(f"{machine}\n")
    for place, part in enumerate(parts(shape, device, positions, layers, folder)):
        left_s = 60 * minutes - TO_DRAW_S - (time.monotonic() - begin)
        check = run(part, left_s, folder / "logs" / f"{place:02}-{part.module}.log")
        click.echo(f"{time.monotonic() - begin:4.0f} s  {check}")
        results.checks.append(check)
        if not check.held:
            results.not_measured.append(NotMeasured(part.name, check.found))
    drawing = Part("figures and table", "bench.plots", (str(folder), "--into", str(folder / "figures")),
                   TO_DRAW_S)  # fmt: skip
    check = run(drawing, TO_DRAW_S, folder / "logs" / "plots.log")
    click.echo(f"{time.monotonic() - begin:4.0f} s  {check}")
    results.checks.append(check)
    results.settings["elapsed_s"] = round(time.monotonic() - begin, 1)
    write(results, folder / "summary.json")
    if archive is not None:
        pack(folder, archive)
        click.echo(f"archive in {archive}")
    missed = [one.what for one in results.checks if not one.held]
    if missed:
        raise click.ClickException(
            f"not all there: {', '.join(missed)}; the logs are in {folder}/logs"
        )


if __name__ == "__main__":
    main(prog_name="python -m bench.gpu")
