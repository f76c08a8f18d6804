"""Many stopped sessions at once, more than the device has room for, resumed in another order.

`python -m bench.memory_pressure --config bench/configs/memory-pressure-tiny.yaml`
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch

from bench import config, pressure_report
from bench.pressure import Came, Pressure, Stopped
from bench.pressure_config import MemoryPressure
from djinn_zmq.probe import command, interrupted, progress
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.samples import Samples

FILE = "memory_pressure.json"


def run(asked: MemoryPressure) -> Results:
    """Stop all, resume all in another order, compare; write and report. The results' checks are those
    of the validation block."""
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {one.name: getattr(asked, one.name) for one in fields(asked)}
    settings["validation"] = {k: v for k, v in asdict(asked.validation).items() if v is not None}
    results = Results("memory_pressure", this_machine(), settings)
    click.echo(f"{results.machine}\n")
    came: list[Came] = []
    stops_s: list[float] = []
    with (
        interrupted.written(results, folder / FILE),
        ExitStack() as stack,
        torch.inference_mode(),
    ):
        pressure = Pressure(asked, stack)
        pressure.expect()
        pressure.plain.give_back()  # a GPU may not have room for two models and the sessions
        try:
            _work(pressure, came, stops_s)
        finally:
            _tell(results, pressure, came, stops_s)
    results.checks = pressure_report.checks(pressure, came)
    write(results, folder / FILE)
    pressure_report.show(results)
    click.echo(f"\nresults in {folder / FILE}")
    return results


def _tell(results: Results, pressure: Pressure, came: list[Came], stops_s: list[float]) -> None:
    """What has been measured so far."""
    results.settings |= {
        "layer": pressure.layer,
        "activation_nbytes": pressure.plain.activation_nbytes,
    }
    stops = [Samples.of("stop", stops_s, {"what": "stop"})] if stops_s else []
    results.samples = [*stops, *_by_tier(came)]
    results.tables["timeline"] = pressure.timeline
    results.tables["resumes"] = [
        {"session": one.number, "seconds": one.seconds, "tier": one.tier, "n": 1} for one in came
    ]


def _work(pressure: Pressure, came: list[Came], stops_s: list[float]) -> None:
    """Fills *came* and *stops_s* as it goes."""
    asked = pressure.asked
    waiting: list[Stopped] = []
    pressure.sample("begin", 0)
    with progress.steps("sessions", 2 * asked.sessions) as tell:
        for number in range(asked.sessions):
            begin = time.perf_counter()
            waiting.append(pressure.stop(number))
            stops_s.append(time.perf_counter() - begin)
            pressure.sample("stop", len(waiting))
            if number % asked.others_every == 0:
                pressure.ask_between()
            tell(f"stopped {number}")
        for place, chosen in enumerate(pressure.rng.permutation(asked.sessions)):
            came.append(pressure.resume(waiting[chosen]))
            waiting[chosen].let_go()
            pressure.sample("resume", asked.sessions - place - 1)
            if place % asked.others_every == 0:
                pressure.ask_between()
            tell(f"resumed {chosen}")
    pressure.model.ping()  # what is to be released has gone ahead of it
    pressure.sample("released", 0)


def _by_tier(came: list[Came]) -> list[Samples]:
    tiers = list(dict.fromkeys(one.tier for one in came))
    return [
        Samples.of(
            f"resume from {tier}",
            [one.seconds for one in came if one.tier == tier],
            {"what": "resume", "tier": tier},
        )
        for tier in tiers
    ]


@click.command(cls=command.Tool)
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML file to start from.")
@click.option("--model", help="A shape (random weights), a served name, a directory, a hub id.")
@click.option("--device", help='"cpu" or "cuda:N".')
@click.option("--sessions", type=int, help="How many are stopped at once.")
@click.option("--context", type=int, help="Tokens of each.")
@click.option("--stop-at", type=int, help="Layers before the stop.")
@click.option("--gpu-share", type=float, help="Of what the sessions need: the GPU's part of it.")
@click.option("--host-memory", type=int, help="MiB of the server's host tier.")
@click.option("--output-dir", help="Where the results go.")
def main(path: Path | None, **given: Any) -> None:
    """Stop many sessions, keep them all, resume them in another order: is every token right, and
    what does it cost in memory?

    One of them is steered when it is resumed, and a second client is served in between. All that
    comes out is compared with the plain model of this process.

    The file's validation block says what has to hold; the exit status is 0 only if all of it was
    measured and held.

    \b
      python -m bench.memory_pressure --config bench/configs/memory-pressure-tiny.yaml
      python -m bench.memory_pressure --config bench/configs/memory-pressure-llama-2-13b.yaml
    """
    over = {key: value for key, value in given.items() if value is not None}
    results = run(config.read(MemoryPressure, path, over))
    failed = [one for one in results.checks if not one.held]
    if failed:
        raise click.ClickException("; ".join(str(one) for one in failed))


if __name__ == "__main__":
    main(prog_name="python -m bench.memory_pressure")
