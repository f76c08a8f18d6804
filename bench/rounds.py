"""Does memory come back? `python -m bench.rounds`.

In a session with a past, again and again: stop in a step of a generation, resume it twice with
edits, release everything. Shown is what the engine and the server keep resident over the rounds, and
what the session's keys and values take; and, before that, what 64 branches of one checkpoint add.
"""

import gc
from pathlib import Path

import click
import numpy as np

import djinn_zmq as djinn
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, Results, write
from djinn_zmq.probe.serving import own_server, sockets_folder
from djinn_zmq.probe.targets import Picture, Target
from djinn_zmq.settings import MIB, format_bytes

ROWS_LIMIT = 500  # of the results; the checks look at every round
BRANCHES = 64
PAGE = 4096
SLACK = 1 * MIB  # the allocator's, and the pages of code that comes late


@click.command()
@click.option("--model", default="tiny", show_default=True, help="A served name or a directory.")
@click.option("--rounds", default=1000, show_default=True, help="Rounds that count.")
@click.option("--warm-up", default=200, show_default=True, help="Rounds before these.")
@click.option("--positions", default=200, show_default=True, help="Tokens of the past.")
@click.option(
    "--plot",
    type=Picture(),
    help="Draw resident sizes here (PNG).",
)
@click.option("--json", "path", type=Target(), help="Write results here.")
def main(
    model: str, rounds: int, warm_up: int, positions: int, plot: Path | None, path: Path | None
) -> None:
    """Stop, resume and release a thousand times, and look at the memory.

    Target: at the end the engine keeps no more resident than at the start, but for 1 MiB, and the
    session's keys and values are back to the byte.
    """
    settings = {"model": model, "rounds": rounds, "warm_up": warm_up, "positions": positions}
    results = Results("rounds", this_machine(), settings)
    with (
        sockets_folder() as folder,
        own_server(folder, "--threads=1", model=model) as served,
        djinn.connect(served.ipc, progress=None) as server,
    ):
        rows = _measured(server, served.pids, results, rounds, warm_up, positions, model)
    every = -(-len(rows) // ROWS_LIMIT)
    results.settings["every"] = every
    results.tables["rounds"] = [*rows[:-1:every], rows[-1]]
    click.echo(str(results.machine))
    click.echo("\n".join(map(str, results.checks)))
    start, end = rows[0], rows[-1]
    for name in ("engine", "server", "kv"):
        click.echo(
            f"{name:<8} start {format_bytes(start[name]):>10}   end {format_bytes(end[name]):>10}"
        )
    if plot is not None:
        _draw(rows, f"{model}, {positions} tokens of past, n = {rounds}", plot)
    if path is not None:
        write(results, path)


def _measured(
    server: djinn.Server,
    pids: tuple[int, ...],
    results: Results,
    rounds: int,
    warm_up: int,
    positions: int,
    name: str,
) -> list[dict[str, int]]:
    model = server.model(name)
    rng = np.random.default_rng(0)
    rows = []
    with model.session() as session:
        session.run(rng.integers(3, model.vocab_size, positions), logits="none")
        start = session.mark()
        results.checks.append(_branches(model, session))
        session.back(start)
        begin = _kv(model, session)
        for number in range(-warm_up, rounds + 1):
            if number >= 0:
                rows.append(
                    {
                        "n": 1,
                        "round": number,
                        "engine": _resident(pids[1]),
                        "server": _resident(pids[0]),
                        "kv": _kv(model, session),
                    }
                )
            _round(session, start)
    first, last = rows[0], rows[-1]
    grown = last["engine"] - first["engine"]
    results.checks.append(
        Check(
            f"after {rounds} rounds the engine is within {format_bytes(SLACK)} of its start",
            grown <= SLACK,
            f"{grown:+} bytes of {first['engine']}",
        )
    )
    results.checks.append(
        Check(
            "keys and values are back to the byte after every round",
            all(row["kv"] == begin for row in rows),
            f"{format_bytes(max(row['kv'] for row in rows))} at most, {format_bytes(begin)} begun with",
        )
    )
    return rows


def _round(session: djinn.Session, start: object) -> None:
    session.back(start)
    stopped = session.generate(max_new_tokens=4, ends=(), stop_at=2, steps=1)
    stopped.finish()
    point = stopped.checkpoint
    for factor in (1.0, 0.5):
        point.resume(djinn.Scale(factor), stop_at=3).checkpoint.release()
        stopped.resume(djinn.Scale(factor)).finish()
    point.release()
    session.back(start)


def _branches(model: djinn.Model, session: djinn.Session) -> Check:
    point = session.run([5], stop_at=1).checkpoint
    one = _kv(model, session)
    held = [point.resume(stop_at=2).checkpoint for _ in range(BRANCHES)]
    many = _kv(model, session)
    for checkpoint in held:
        checkpoint.release()
    return Check(
        f"{BRANCHES} branches of one checkpoint hold one copy of the past",
        many - one < one,
        f"{format_bytes(one)} with the past, {format_bytes(many - one)} more with {BRANCHES} branches",
    )


def _kv(model: djinn.Model, session: djinn.Session) -> int:
    gc.collect()
    model.ping()  # behind the releases of what nobody refers to any more
    server: djinn.Server = model.server
    return next(one.kv for one in server.sessions() if one.id == session.id)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def _draw(rows: list[dict[str, int]], title: str, path: Path) -> None:
    from djinn_zmq.probe.drawing import DASHES, DPI, SHADES, Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [row["round"] for row in rows]
    for place, name in enumerate(("engine", "server")):
        sizes = np.array([row[name] for row in rows]) / MIB
        axes.plot(numbers, sizes - sizes[0], DASHES[place], color=SHADES[place * 2], label=name)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel("stop / resume / release rounds")
    axes.set_ylabel("resident size, MiB above the start")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main(prog_name="python -m bench.rounds")
