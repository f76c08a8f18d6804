"""What does importing the client cost? `python -m bench.import_time`.

Bytecode is at hand for every module, as an installation has it. A checkout has none of its own where
PYTHONDONTWRITEBYTECODE is set (its dependencies have: pip made it), and there would be compiled again
in every process: that is a case of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

import djinn_zmq
from djinn_zmq.probe import tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import Samples, ratio
from djinn_zmq.probe.targets import Target

MOST_S = 0.150
CLIENT, DEPENDENCIES, NOTHING = "import djinn_zmq", "import numpy, zmq, msgspec", "pass"
COMPILED = f"{CLIENT}, compiled each time"


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


def with_bytecode(folder: Path) -> dict[str, str]:
    """The environment of a python that keeps its bytecode in *folder*."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return rest | {"PYTHONPYCACHEPREFIX": str(folder)}


def without_ours(folder: Path, target: Path) -> dict[str, str]:
    """The same with all that is in *folder* but this package's, which is not kept there either."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / Path(djinn_zmq.__file__).parent.relative_to("/"))
    return with_bytecode(target) | {"PYTHONDONTWRITEBYTECODE": "1"}


def importing(statement: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)


@click.command()
@click.option("--samples", default=40, show_default=True, help="Processes started for each case.")
@click.option("--json", "path", type=Target(), help="Write results here.")
def main(samples: int, path: Path | None) -> None:
    """Start python and import the client, or only what it depends on, or nothing.

    Targets: at most 1.5 times numpy, zmq and msgspec alone, python's own start included; 150 ms
    beyond python's own start; no torch.
    """
    with tempfile.TemporaryDirectory() as scratch:
        kept = with_bytecode(Path(scratch, "kept"))
        importing(CLIENT, kept)
        compiling = without_ours(Path(scratch, "kept"), Path(scratch, "compiling"))
        cases = {
            CLIENT: lambda: importing(CLIENT, kept),
            DEPENDENCIES: lambda: importing(DEPENDENCIES, kept),
            NOTHING: lambda: importing(NOTHING, kept),
            COMPILED: lambda: importing(CLIENT, compiling),
        }
        taken = interleaved(cases, Plan.of(samples, 10, warm_up=1, settle=0))
    results = Results(
        "import_time",
        this_machine(),
        {"samples": samples},
        samples=list(taken.values()),
        ratios=[
            ratio(taken[CLIENT], taken[DEPENDENCIES], limit=1.5),
            ratio(taken[COMPILED], taken[DEPENDENCIES]),
        ],
        checks=[within(taken[CLIENT], taken[NOTHING]), without_torch()],
    )
    click.echo(f"{results.machine}\n\n{tables.of_samples('whole process', results.samples, 'ms')}")
    click.echo("\n" + tables.of_ratios("at the median", results.ratios))
    click.echo("\n".join(map(str, results.checks)))
    if path is not None:
        write(results, path)


if __name__ == "__main__":
    main(prog_name="python -m bench.import_time")
