"""The whole experiment on one GPU, in one command of at most eight minutes: `python -m bench.gpu`.

A part that fails or runs out of its time is reported by name and the others go on; what was taken is
kept, drawn, and put into one archive. The longer prompts come last, with all the time that is left:
what rounds there are of them is kept, where half of another part is worth nothing.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from bench.config import read
from bench.parts import ROOT, Part, pack, run
from bench.plain import device_of
from bench.pressure_config import MemoryPressure
from bench.resume_latency import tier_options
from djinn_zmq.client.local import private_server
from djinn_zmq.errors import StartError
from djinn_zmq.probe import command, serving
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, NotMeasured, Results, write
from djinn_zmq.probe.targets import Target

MEMORY = ROOT / "bench" / "configs" / "memory-pressure-gpu.yaml"
NOWHERE = {"ipc": "", "tcp": ""}
TO_DRAW_S = 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    shape: str
    device: str
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    folder: Path

    @property
    def served(self) -> tuple[str, ...]:
        """Options of a part that starts a server of its own."""
        return f"--model={self.shape}", f"--device={self.device}"


# ---- the parts


def on_one_server(asked: Asked, at: dict[str, str]) -> Iterator[Part]:
    """What only resumes. at: "ipc", "tcp" → the endpoint of a server with the model."""
    to_it = (f"--model={asked.shape}", f"--server={at['ipc']}")
    yield _resume(asked, asked.positions[0], to_it, per_turn=5, most_s=120)
    for name, way, *options in (
        ("logits", "ipc"),
        ("ready", "ipc", "--to=ready"),
        ("activation", "tcp", "--carry=activation"),
    ):
        path = asked.folder / "decompose" / f"{name}.json"
        yield Part(
            f"decomposition, {name}", "tools.decompose",
            (f"--server={at[way]}", f"--model={asked.shape}", f"--positions={asked.positions[0]}",
             "--no-pin", "--samples=40", "--warmup=5", f"--json={path}", *options), 40,
        )  # fmt: skip


def alone(asked: Asked) -> Iterator[Part]:
    """What brings its own server, or none."""
    memory = read(MemoryPressure, MEMORY, {})
    rest = "" if memory.gpu_share is None else f", GPU memory for {memory.gpu_share:.0%} of them"
    yield Part(
        f"memory pressure, {memory.sessions} sessions{rest}", "bench.memory_pressure",
        (f"--config={MEMORY}", *asked.served, f"--context={asked.positions[0]}",
         f"--output-dir={asked.folder / 'memory-pressure'}"), 140,
    )  # fmt: skip
    for name in ("tcp", "zmq_echo"):
        path = asked.folder / "tools" / f"{name}.json"
        options = ("--samples=60", "--nbytes=10557440", f"--json={path}")
        yield Part(f"tool {name}", f"tools.{name}", options, 20)
    for idle_ms, samples in ((0, 100), (2, 100), (50, 20)):
        path = asked.folder / "tools" / f"noop-idle-{idle_ms}.json"
        options = (f"--samples={samples}", f"--idle-ms={idle_ms}", "--no-pin", f"--json={path}")
        yield Part(f"tool noop, {idle_ms} ms idle", "tools.noop", options, 40)
    for tokens in asked.positions[1:]:
        yield _resume(asked, tokens, asked.served, per_turn=3, most_s=240)


def _resume(
    asked: Asked, tokens: int, server: tuple[str, ...], *, per_turn: int, most_s: float
) -> Part:
    at = ("--layers", *map(str, asked.layers)) if asked.layers else ()
    options = (*server, f"--max-length={tokens}", *at, "--warmup=2", "--repeat=4",
               f"--per-turn={per_turn}", "--fresh",
               f"--output-dir={asked.folder / f'resume-{tokens}'}")  # fmt: skip
    return Part(f"resume latency, {tokens} tokens", "bench.resume_latency", options, most_s)


@contextmanager
def _server(asked: Asked) -> Iterator[dict[str, str]]:
    """Its endpoints. It answers while it loads: the first part waits for that, within its own time."""
    with serving.sockets_folder() as folder, serving.sockets_folder() as state:
        port = serving.free_port()
        options = (f"--port={port}", f"--random-weights={asked.shape}", "--threads=1",
                   *tier_options(asked.device, state))  # fmt: skip
        with private_server(folder, asked.device, "auto", *options) as ipc:
            yield {"ipc": ipc, "tcp": f"tcp://127.0.0.1:{port}"}


# ---- the command


class _Sitting:
    """Runs parts until *end_s* of the monotonic clock, and notes how each went."""

    def __init__(self, results: Results, logs: Path, minutes: float) -> None:
        self.results = results
        self._logs = logs
        self._begin_s = time.monotonic()
        self._end_s = self._begin_s + 60 * minutes

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    @property
    def left_s(self) -> float:
        return self._end_s - TO_DRAW_S - time.monotonic()

    def take(self, part: Part, seconds: float | None = None) -> None:
        """seconds: for it. [what is left before the drawing]"""
        log = self._logs / f"{len(self.results.checks):02}-{part.module}.log"
        self.note(run(part, self.left_s if seconds is None else seconds, log))

    def note(self, check: Check) -> None:
        click.echo(f"{self.elapsed_s:4.0f} s  {check}")
        self.results.checks.append(check)
        if not check.held:
            self.results.not_measured.append(NotMeasured(check.what, check.found))
        self.results.settings["elapsed_s"] = round(self.elapsed_s, 1)


def _take_all(asked: Asked, sitting: _Sitting) -> None:
    with ExitStack() as stack:
        try:
            at = stack.enter_context(_server(asked))
        except StartError as exc:
            for part in on_one_server(asked, NOWHERE):
                sitting.note(Check(part.name, False, str(exc)))
        else:
            for part in on_one_server(asked, at):
                sitting.take(part)
    for part in alone(asked):
        sitting.take(part)


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
    device_of(device)
    folder = folder.resolve()
    for name in ("decompose", "tools", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = {"shape": shape, "device": device, "positions": list(positions), "minutes": minutes}
    results = Results("gpu", this_machine(), settings)
    click.echo(f"{results.machine}\n")
    sitting = _Sitting(results, folder / "logs", minutes)
    try:
        _take_all(Asked(shape, device, positions, layers, folder), sitting)
        drawing = (str(folder), "--into", str(folder / "figures"))
        sitting.take(Part("figures and table", "bench.plots", drawing, TO_DRAW_S), TO_DRAW_S)
    finally:
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
