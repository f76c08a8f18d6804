"""What does importing the client cost? `python -m bench.import_time`."""

import subprocess
import sys
from pathlib import Path

import click

from djinn_zmq.probe import tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import Samples, ratio
from djinn_zmq.probe.targets import Target

MOST_S = 0.150
CLIENT, DEPENDENCIES, NOTHING = "import djinn_zmq", "import numpy, zmq, msgspec", "pass"


def without_torch() -> Check:
    """Does importing the client leave torch alone?"""
    asked = "import djinn_zmq, sys; sys.exit('torch' in sys.modules)"
    status = subprocess.run([sys.executable, "-c", asked], check=False).returncode
    return Check("importing the client imports no torch", status == 0, "sys.modules, n = 1")


def within(client: Samples, nothing: Samples) -> Check:
    own_s = client.median_s - nothing.median_s
    return Check(
        f"importing the client takes at most {MOST_S * 1e3:g} ms",
        own_s <= MOST_S,
        f"{own_s * 1e3:.0f} ms beyond python's own start, n = {client.n}",
    )


def importing(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


@click.command()
@click.option("--samples", default=40, show_default=True, help="Processes started for each case.")
@click.option("--json", "path", type=Target(), help="Write results here.")
def main(samples: int, path: Path | None) -> None:
    """Start python and import the client, or only what it depends on, or nothing.

    Targets: at most 1.5 times numpy, zmq and msgspec alone, python's own start included; 150 ms
    beyond python's own start; no torch.
    """
    cases = {text: lambda text=text: importing(text) for text in (CLIENT, DEPENDENCIES, NOTHING)}
    taken = interleaved(cases, Plan.of(samples, 10, warm_up=1, settle=0))
    results = Results(
        "import_time",
        this_machine(),
        {"samples": samples},
        samples=list(taken.values()),
        ratios=[ratio(taken[CLIENT], taken[DEPENDENCIES], limit=1.5)],
        checks=[within(taken[CLIENT], taken[NOTHING]), without_torch()],
    )
    click.echo(f"{results.machine}\n\n{tables.of_samples('whole process', results.samples, 'ms')}")
    click.echo("\n" + tables.of_ratios("at the median", results.ratios))
    click.echo("\n".join(map(str, results.checks)))
    if path is not None:
        write(results, path)


if __name__ == "__main__":
    main(prog_name="python -m bench.import_time")
