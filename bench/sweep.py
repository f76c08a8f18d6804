"""How many cells of a causal-tracing grid a second? `python -m bench.sweep`."""

import os
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

import djinn_zmq as djinn
from bench import sweep_cases
from bench.sweep_cases import Case, Djinn, Grid, Nnsight
from djinn_zmq.probe import pinning, tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, NotMeasured, Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import Samples, ratio
from djinn_zmq.probe.serving import own_server, sockets_folder
from djinn_zmq.probe.targets import Target
from djinn_zmq.settings import models_dir

PROMPTS = {  # clean, corrupted: other from the first token on, so that no cell is unchanged
    "tiny": (
        "anna and john went out . then anna gave a drink to",
        "john and anna went out . then john gave a drink to",
    ),
    "smollm2": ("The capital of France is", "Our capital of Germany is"),
}
USUAL = {  # the corrupted prompt differs in its subject only
    "tiny": ("the capital of france is", "the capital of germany is"),
    "smollm2": ("The capital of France is", "The capital of Germany is"),
}
PLAIN, ONE, BATCH = "one full forward a cell", "nnsight, one trace a cell", "nnsight, one batch"
RESUME, TRACE, USUAL_TRACE = "djinn, one resume a cell", "djinn, trace", "djinn, trace, usual pair"
AT_A_TIME = {"tiny": 16, "smollm2": 5}  # cells of a call that does them one by one
PER_ROUND = {"tiny": 8, "smollm2": 2}  # calls of each case in a turn
QUICK = 2  # the same, where it is to be quick
# bfloat16 has 8 bits; the plain model's own batches of other sizes differ by as much.
AGREES = 2.0**-5


Cpus = tuple[int, ...] | None


def measure(name: str, plan: Plan, results: Results, client_cpus: Cpus, server_cpus: Cpus) -> None:
    path = _path_of(name)
    grid = Grid(path, *PROMPTS[name])
    with (
        sockets_folder() as folder,
        own_server(folder, "--threads=1", model=path) as served,
        djinn.connect(served.ipc, progress=None) as server,
    ):
        results.pinned += [
            pinning.pin(f"{name}: baselines and client", [os.getpid()], client_cpus),
            pinning.pin(f"{name}: server and engine", served.pids, server_cpus),
        ]
        ours = Djinn(grid, server.model(path))
        cases, sizes = _cases(name, grid, ours, results)
        _check(name, grid, ours, cases, results)
        taken = interleaved(cases, plan)
        results.tables[f"{name}: cost"] = [_cost(ours, name, usual) for usual in (False, True)]
    each = {
        case: Samples(f"{name}: {case}", samples.seconds / sizes[case])
        for case, samples in taken.items()
    }
    _report(name, grid, each, results)


def _path_of(name: str) -> str:
    if name == "tiny":
        import djinn_zmq.models

        return str(Path(djinn_zmq.models.__path__[0]) / "tiny")
    path = models_dir() / name
    if not path.is_dir():
        raise click.ClickException(f"{name} is not there: djinn pull {name}")
    return str(path)


def _cases(
    name: str, grid: Grid, ours: Djinn, results: Results
) -> tuple[dict[str, Case], dict[str, int]]:
    count = min(AT_A_TIME[name], len(grid.cells))
    whole = len(grid.cells)
    some = {case: grid.some(count) for case in (PLAIN, ONE, RESUME)}
    usual = USUAL[name]
    usual_cells = grid.depth * len(grid.tokenizer(usual[0])["input_ids"])
    cases: dict[str, Case] = {PLAIN: lambda: sweep_cases.plain(grid, next(some[PLAIN]))}
    sizes = {PLAIN: count, ONE: count, BATCH: whole, RESUME: count, TRACE: whole}
    try:
        theirs = Nnsight(grid)
        cases[ONE] = lambda: theirs.traces(next(some[ONE]))
        cases[BATCH] = lambda: theirs.batch(grid.cells)
    except ImportError as exc:
        results.not_measured += [NotMeasured(f"{name}: {one}", str(exc)) for one in (ONE, BATCH)]
    cases[RESUME] = lambda: ours.resumes(next(some[RESUME]))
    cases[TRACE] = ours.whole
    cases[USUAL_TRACE] = lambda: ours.trace(prompts=usual)
    return cases, {**sizes, USUAL_TRACE: usual_cells}


def _check(name: str, grid: Grid, ours: Djinn, cases: dict[str, Case], results: Results) -> None:
    """Do they all compute the same thing?"""
    expected = sweep_cases.plain(grid, grid.cells)
    found = {RESUME: ours.resumes(grid.cells), TRACE: ours.whole()}
    if BATCH in cases:
        found[BATCH] = cases[BATCH]()  # type: ignore[assignment]
    for case, logits in found.items():
        share = sweep_cases.apart(logits, expected)
        same = sum(logits[cell].argmax() == expected[cell].argmax() for cell in grid.cells)
        results.checks.append(
            Check(
                f"{name}: {case} gives the logits of one full forward a cell",
                share <= AGREES,
                f"largest difference {share:.2%} of the largest logit; the same likeliest token in "
                f"{same} of {len(grid.cells)} cells",
            )
        )


def _cost(ours: Djinn, name: str, usual: bool) -> dict[str, object]:
    cost = ours.trace(prompts=USUAL[name] if usual else None).cost
    return {
        "case": USUAL_TRACE if usual else TRACE,
        "cells": cost.branches,
        "unchanged": cost.unchanged,
        "batches": cost.batches,
        "layers_executed": cost.layers,
        "layers_of_full_forwards": cost.layers_full,
        "skipped": cost.skipped,
        "n": 1,
    }


def _report(name: str, grid: Grid, each: dict[str, Samples], results: Results) -> None:
    results.samples += each.values()
    results.tables[f"{name}: cells a second"] = [
        {"case": case, "cells_per_s": 1 / one.median_s, "n": one.n} for case, one in each.items()
    ]
    for case, limit in ((PLAIN, None), (ONE, 4.0), (BATCH, 1.0), (RESUME, None)):
        if case in each:
            results.ratios.append(
                ratio(
                    each[case],
                    each[TRACE],
                    name=f"{name}: cells a second, djinn's trace over {case}",
                    limit=limit,
                    at_least=True,
                )
            )
    title = f"{name}, {grid.depth} layers × {grid.positions} positions, a cell"
    click.echo("\n" + tables.of_samples(title, [replace(one) for one in each.values()], "ms"))
    rows = [[case, f"{1 / one.median_s:,.1f}", str(one.n)] for case, one in each.items()]
    click.echo("\n" + tables.aligned([f"{name}, median", "cells/s", "n"], rows))
    for row in results.tables[f"{name}: cost"]:
        click.echo(
            f"{row['case']}: {row['cells']} cells, {row['unchanged']} unchanged, "
            f"{row['layers_executed']} of {row['layers_of_full_forwards']} layers executed, "
            f"{row['skipped']:.0%} skipped"
        )


@click.command()
@click.option(
    "--model",
    "names",
    type=click.Choice(sorted(PROMPTS)),
    multiple=True,
    default=("tiny", "smollm2"),
    show_default=True,
    help="Models; repeatable. smollm2 is what `djinn pull smollm2` brings.",
)
@click.option("--rounds", default=10, show_default=True, help="Turns the cases take.")
@click.option("--pin/--no-pin", default=True, help="Client on one CPU, servers on another. [yes]")
@click.option("--json", "path", type=Target(), help="Write results here.")
@click.option(
    "--quick", is_flag=True, help="tiny only, at most three short rounds; intervals get wide."
)
def main(names: tuple[str, ...], rounds: int, pin: bool, path: Path | None, quick: bool) -> None:
    """The causal-tracing grid (every layer × every position), in cells a second.

    \b
    one full forward a cell     the model by itself with a hook: what one writes by hand
    nnsight, one trace a cell   as its documentation steers
    nnsight, one batch          every cell an invoke of one trace: one batched forward
    djinn, one resume a cell    from the corrupted run's checkpoints
    djinn, trace                model.trace: one request for the whole grid

    All with one thread, all computing the head for the last position only. Each is first compared
    with the full forwards, cell by cell. The prompts differ from their first token on; "usual pair"
    is one that differs in its subject, where the cells before it are known to be unchanged.
    Targets: the trace does at least 4 times the cells a second of nnsight's one trace a cell, and
    more than its batch. All cases take turns; intervals are 95 % bootstrap intervals over rounds.
    """
    names = ("tiny",) if quick else tuple(dict.fromkeys(names))
    rounds = min(rounds, 3) if quick else rounds
    torch.set_num_threads(1)
    settings = {"models": list(names), "rounds": rounds, "quick": quick}
    results = Results("sweep", this_machine(), settings)
    click.echo(results.machine)
    begin = time.monotonic()
    client_cpus, server_cpus = pinning.two_sides() if pin else (None, None)
    pinning.pin("client", [os.getpid()], client_cpus)  # threads to come inherit it
    for name in names:
        plan = Plan(rounds, QUICK if quick else PER_ROUND[name], warm_up=2, settle=1)
        measure(name, plan, results, client_cpus, server_cpus)
    click.echo("\n" + "\n".join(str(one) for one in results.pinned))
    click.echo("\n" + "\n".join(str(one) for one in (*results.checks, *results.not_measured)))
    click.echo("\n" + tables.of_ratios("at the medians", results.ratios))
    if path is not None:
        write(results, path)
    click.echo(f"\n{time.monotonic() - begin:.0f} s" + (f", results in {path}" if path else ""))


if __name__ == "__main__":
    main(prog_name="python -m bench.sweep")
