"""The fast path's budgets, each measured in one run with what it is held against.

`python -m bench.fastpath --shape llama-2-13b --device cuda:0 --out DIR --archive DIR.tar.gz`

Nothing is measured here: each part is one of the other benchmarks in a process of its own. What a part
found is put into the table, and into fastpath.json, as soon as the part has ended.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from bench.budgets import SESSIONS, Line, awake, budgets, into, line_of, rest, table_of
from bench.config import spread
from bench.parts import ROOT, Part, pack, run
from bench.plain import config_of, device_of
from bench.spinning import OVER_US
from bench.writing import BEFORE, FIRST
from djinn_zmq.memory import shared
from djinn_zmq.probe import command, pinning, schema, tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, Results, write
from djinn_zmq.probe.targets import Target
from djinn_zmq.settings import MIB

FILE = "fastpath.json"
MEMORY = ROOT / "bench" / "configs" / "fastpath-memory.yaml"
NAMES = ("resume-0", "noop", "swap", "memory", "resume-50", "resume-2", "upload", "import",
         "spin-noop", "spin-resume-0", "spin-resume-50", "spin-resume-2")  # fmt: skip
DRAWN = ("resume-0", "memory", "resume-50", "resume-2")
IDLE_MS = (0, 2, 50)
SPIN_SAMPLES = 640  # so that 16 are left of them at the longest gap
TO_DRAW_S = 30.0
HOST_MEMORY = 65536  # MiB: 64 sessions of 1031 tokens are 54 GiB in Llama-2-13B's shape
SHARE = 1 / 3  # of the memory that the stopped sessions need: what the GPU has for them


# ---- the parts


def parts(asked: "Asked", folder: Path) -> dict[str, Part]:
    """By name."""
    shape, device, tokens = asked.shape, asked.device, asked.positions
    found = {}
    for idle_ms in IDLE_MS:
        whole = ("eager", "saving") if idle_ms == 0 else ()
        found[f"resume-{idle_ms}"] = Part(
            f"resume, {idle_ms} ms idle", "bench.resume_latency",
            (*_resuming(asked, folder / f"resume-{idle_ms}", idle_ms),
             "--baselines", "manual_offload", "djinn", "bare", *whole,
             "--transports", "lane", "ipc", "--tiers", "device", "host",
             "--edits", "none", "in_place", "row_in_place"), 180,
        )  # fmt: skip
        spin_us = OVER_US[idle_ms]
        found[f"spin-resume-{idle_ms}"] = Part(
            f"resume, {idle_ms} ms idle, --spin-us {spin_us}", "bench.resume_latency",
            (*_resuming(asked, folder / f"spin-resume-{idle_ms}", idle_ms), f"--spin-us={spin_us}",
             "--baselines", "manual_offload", "djinn", "--transports", "lane", "--tiers", "device",
             "--edits", "none", "--ends", "ready", "--without", FIRST, BEFORE, "none, layer"),
            90, pinning.too_few_to_spin(),
        )  # fmt: skip
    pin = "--pin" if device == "cpu" else "--no-pin"
    load = ("--clients=64",) if find_spec("grpc") else ("--no-load",)
    found["noop"] = Part(
        "no-op", "bench.noop",
        (f"--samples={asked.samples}", *load, pin, "--without=server only",
         f"--json={folder / 'noop.json'}"), 120,
    )  # fmt: skip
    found["spin-noop"] = Part(
        "no-op, --spin-us", "bench.noop",
        (f"--samples={min(SPIN_SAMPLES, asked.samples)}", "--no-load", "--no-pin",
         *(f"--spin-us={one}" for one in OVER_US.values()),
         *(f"--without={one}" for one in ("ipc", "server only", "front", "raw socket")),
         f"--json={folder / 'spin-noop.json'}"), 90, pinning.too_few_to_spin(),
    )  # fmt: skip
    found["upload"] = Part(
        "upload", "bench.upload", ("--samples=100", pin, f"--json={folder / 'upload.json'}"), 60
    )
    found["import"] = Part(
        "import", "bench.import_time", ("--samples=30", f"--json={folder / 'import.json'}"), 60
    )
    found["swap"] = Part(
        "swap", "bench.swap",
        (f"--shape={shape}", f"--device={device}", f"--positions={tokens}",
         f"--json={folder / 'swap.json'}"), 120,
    )  # fmt: skip
    layers = config_of(shape).num_hidden_layers
    found["memory"] = Part(
        f"{SESSIONS} stopped sessions", "bench.memory_pressure",
        (f"--config={MEMORY}",
         f"--model={shape}", f"--device={device}", f"--context={tokens}", f"--stop-at={layers}",
         f"--sessions={SESSIONS}", f"--gpu-share={SHARE}", f"--host-memory={_host_memory()}",
         f"--output-dir={folder / 'memory'}"), 200,
    )  # fmt: skip
    return found


def _host_memory() -> int:
    """MiB: what the sessions of the largest shape need, where the machine has that to spare."""
    return min(HOST_MEMORY, shared.installed() * 3 // 4 // MIB)


def _resuming(asked: "Asked", folder: Path, idle_ms: int) -> tuple[str, ...]:
    """Options that all parts with resumes have."""
    few = ("--warmup=2", f"--repeat={asked.rounds}", "--per-turn=5") if idle_ms == 0 else (
        "--warmup=1", "--repeat=4", "--per-turn=4", "--ends", "ready")  # fmt: skip
    return (f"--model={asked.shape}", f"--device={asked.device}", f"--max-length={asked.positions}",
            f"--idle-ms={idle_ms}", f"--output-dir={folder}", "--fresh",
            "--without", "KV", "each call", "device time", "keeps every", "then layers", "ipc, to logits",
            "--layers", *map(str, asked.layers), *few)  # fmt: skip


def path_of(part: str) -> str:
    """Where its results are."""
    if "resume-" in part:
        return f"{part}/resume_latency.json"
    return "memory/memory_pressure.json" if part == "memory" else f"{part}.json"


def results_of(part: str, folder: Path) -> schema.File | None:
    path = folder / path_of(part)
    return schema.read(path) if path.exists() else None


# ---- the table


def lines_of(folder: Path, outcome: dict[str, Check]) -> list[Line]:
    found, why = {}, {}
    for part in NAMES:
        check = outcome.get(part)
        why[part] = "its part was not run" if check is None else check.found
        try:
            found[part] = results_of(part, folder) if check is not None else None
        except ValueError as exc:
            found[part], why[part] = None, str(exc)
    wanted = [one for idle in IDLE_MS for one in budgets(idle)] + list(rest())
    wanted += [one for idle in IDLE_MS for one in awake(idle, OVER_US[idle])]
    return [line_of(one, found[one.part], why[one.part]) for one in wanted]


def times_of(folder: Path, outcome: dict[str, Check]) -> Iterator[dict[str, object]]:
    """Every case of every part that is there, as a row."""
    for part in outcome:
        found = results_of(part, folder)
        for one in found.samples if found is not None else ():
            yield {
                "part": part,
                "case": one.name,
                "median_s": one.median,
                "p90_s": one.p90,
                "n": one.n,
            }


def shown_times(rows: list[dict[str, Any]]) -> str:
    cells = [
        [row["part"], row["case"], *(tables.number(row[key] * 1e3) for key in ("median_s", "p90_s")),
         str(row["n"])]
        for row in rows if "resume-" in row["part"]
    ]  # fmt: skip
    lines = [[f"{part}: {case}", *more] for part, case, *more in cells]
    return tables.aligned(["ms", "p50", "p90", "n"], lines)


# ---- the command


@dataclass(frozen=True, slots=True)
class Asked:
    shape: str
    device: str
    positions: int
    layers: tuple[int, ...]
    rounds: int
    samples: int


@click.command(cls=command.Tool)
@click.option("--shape", default="llama-2-13b", show_default=True, help="Random weights of it.")
@click.option("--device", default="cuda:0", show_default=True, help='"cuda:N" or "cpu".')
@click.option("--positions", type=click.IntRange(1), default=1031, show_default=True,
              help="Tokens of the prompt.")  # fmt: skip
@click.option("--layers", type=int, multiple=True, help="To stop at; repeatable. [default: five]")
@click.option("--rounds", type=click.IntRange(2), default=6, show_default=True,
              help="Of the resume's cases, back to back; an even number is fair.")  # fmt: skip
@click.option("--samples", type=click.IntRange(40), default=1000, show_default=True,
              help="No-ops of each case, back to back.")  # fmt: skip
@click.option("--parts", "names", type=click.Choice(NAMES), multiple=True,
              help="Only these; repeatable. [default: all]")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(0.2), default=9.0, show_default=True,
              help="All of it takes at most this long; what no time is left for is named.")  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False),
              default=Path("results-fastpath"), show_default=True, help="Where it all goes.")  # fmt: skip
@click.option("--archive", "packed", type=Target(),
              help="All of it once more, as one .tar.gz.")  # fmt: skip
def main(
    shape: str,
    device: str,
    positions: int,
    layers: tuple[int, ...],
    rounds: int,
    samples: int,
    names: tuple[str, ...],
    minutes: float,
    folder: Path,
    packed: Path | None,
) -> None:
    """Every budget of the fast path, as a ratio to manual offload, the bare doorbell, bare ZMQ or raw
    TCP in the same run; also after 2 and 50 ms of idling.

    \b
      python -m bench.fastpath --out DIR --archive DIR.tar.gz
      python -m bench.fastpath --shape small --device cpu --positions 64 --parts noop --parts swap

    What time is left goes to the parts in this order. Exit status 0 where every part left results:
    what was missed is told by the table. What spins needs four CPUs, and is not begun with fewer.
    """
    begin = time.monotonic()
    chosen = [name for name in NAMES if not names or name in names]
    device_of(device)
    count = config_of(shape).num_hidden_layers
    layers = layers or tuple(spread(count))
    folder = folder.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    asked = Asked(shape, device, positions, layers, rounds, samples)
    settings = {"shape": shape, "device": device, "positions": positions, "layers": list(layers),
                "parts": chosen, "minutes": minutes}  # fmt: skip
    results = Results("fastpath", this_machine(), settings)
    click.echo(f"{results.machine}\n")
    outcome: dict[str, Check] = {}
    made = parts(asked, folder)
    for name in chosen:
        (folder / path_of(name)).unlink(missing_ok=True)  # of a run before
    for name in chosen:
        left_s = 60 * minutes - TO_DRAW_S - (time.monotonic() - begin)
        outcome[name] = run(made[name], left_s, folder / "logs" / f"{name}.log")
        there = results_of(name, folder) is not None
        said = "done" if outcome[name].held else "left results" if there else "FAILED"
        said = "not here" if made[name].cannot else said
        click.echo(
            f"{time.monotonic() - begin:4.0f} s  {made[name].name}, {said}: {outcome[name].found}"
        )
        into(results, lines_of(folder, outcome))
        results.tables["times"] = list(times_of(folder, outcome))
        results.settings["elapsed_s"] = round(time.monotonic() - begin, 1)
        write(results, folder / FILE)
    table = table_of(lines_of(folder, outcome), layers)
    click.echo(f"\n{shown_times(results.tables['times'])}\n\n{table}")
    (folder / "table.txt").write_text(f"{results.machine}\n\n{table}\n")
    if any(results_of(name, folder) is not None for name in DRAWN):
        figures = Part("figures", "bench.plots", (str(folder), "--into", str(folder / "figures")),
                       TO_DRAW_S)  # fmt: skip
        click.echo(str(run(figures, figures.most_s, folder / "logs" / "figures.log")))
    if packed is not None:
        pack(folder, packed)
        click.echo(f"archive in {packed}")
    failed = [
        one.what for name, one in outcome.items()
        if results_of(name, folder) is None and not made[name].cannot
    ]  # fmt: skip
    if failed:
        raise click.ClickException(f"not all there: {', '.join(failed)}; logs in {folder}/logs")


if __name__ == "__main__":
    main(prog_name="python -m bench.fastpath")
