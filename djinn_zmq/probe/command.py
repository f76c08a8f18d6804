"""What the latency tools' command lines share: options, errors in one sentence, reports."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import djinn_zmq as djinn
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.server import Server
from djinn_zmq.errors import DjinnError
from djinn_zmq.probe import interrupted, pinning, progress, serving, tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.rounds import Case, Plan, Task, interleaved
from djinn_zmq.probe.samples import Samples
from djinn_zmq.probe.targets import Picture, Target

ROUNDS = 20
SEED = 7  # of the prompt's ids
Step = Callable[..., Any]


class Tool(click.Command):
    """What goes wrong is said in one sentence, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DjinnError as exc:
            raise click.ClickException(str(exc)) from exc
        except ConnectionError as exc:
            raise click.ClickException(f"the connection broke: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Asked:
    """How to measure, as the command line said."""

    samples: int
    warmup: int
    idle_ms: float
    pin: bool
    json: Path | None
    plot: Path | None

    @property
    def plan(self) -> Plan:
        gap_s = self.idle_ms / 1e3
        return Plan.of(self.samples, ROUNDS, gap_s=gap_s, warm_up=self.warmup)

    def as_settings(self) -> dict[str, Any]:
        return {"samples": self.samples, "warmup": self.warmup, "idle_ms": self.idle_ms}


def measuring(samples: int = 200) -> Callable[[Step], Step]:
    """The options every tool has; the command is given them as its first argument, an `Asked`."""

    def decorate(command: Step) -> Step:
        @click.option(
            "--samples",
            type=click.IntRange(4),
            default=samples,
            show_default=True,
            help="Timed calls of each case, spread over rounds in which the cases take turns.",
        )
        @click.option(
            "--warmup",
            type=click.IntRange(0),
            default=20,
            show_default=True,
            help="Untimed calls of each case before the first round.",
        )
        @click.option(
            "--idle-ms",
            type=click.FloatRange(0, 10_000),
            default=0.0,
            show_default=True,
            help="Milliseconds the client sleeps before each call, as a person at work does; "
            "whoever must wake then shows. 0: back to back.",
        )
        @click.option(
            "--pin/--no-pin",
            default=True,
            help="Client on one CPU, servers it started on another. Ratios are unstable without. "
            "[default: pin]",
        )
        @click.option(
            "--json",
            type=Target(),
            help="Write the results, with machine, versions and all samples, to this file.",
        )
        @click.option(
            "--plot",
            type=Picture(),
            help="Draw them into this file (.png, .pdf, .svg). Needs matplotlib.",
        )
        @functools.wraps(command)
        def wrapped(
            samples: int,
            warmup: int,
            idle_ms: float,
            pin: bool,
            json: Path | None,
            plot: Path | None,
            **more: Any,
        ) -> Any:
            return command(Asked(samples, warmup, idle_ms, pin, json, plot), **more)

        return wrapped

    return decorate


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model that is measured is, as the command line said. server: None: an own one."""

    server: str | None
    key: Path | None
    model: str | None
    shape: str | None
    device: str
    threads: int


def serving_options(command: Step) -> Step:
    """Which server; the command is given a `Place` as `place`."""

    @click.option(
        "--server",
        metavar="ENDPOINT",
        help="A running server: tcp://HOST:PORT, HOST:PORT or ipc://PATH. "
        "[default: one of its own, gone at the end]",
    )
    @click.option(
        "--key",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Your key file, for a server that wants one.",
    )
    @click.option("--model", metavar="NAME", help="Model to use. [default: tiny]")
    @click.option(
        "--shape", help="For an own server: random weights of this shape (small, llama-2-13b …)."
    )
    @click.option(
        "--device", default="cpu", show_default=True, help='For an own server: "cpu" or "cuda:N".'
    )
    @click.option(
        "--threads",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="For an own server on the CPU: threads of its engine. More than one get in each "
        "other's way where the servers are pinned to one CPU.",
    )
    @functools.wraps(command)
    def wrapped(
        *arguments: Any,
        server: str | None,
        key: Path | None,
        model: str | None,
        shape: str | None,
        device: str,
        threads: int,
        **more: Any,
    ) -> Any:
        place = Place(endpoint_of(server), key, model, shape, device, threads)
        return command(*arguments, place=place, **more)

    return wrapped


def endpoint_of(server: str | None) -> str | None:
    """HOST:PORT is a TCP endpoint."""
    return server if server is None or "://" in server else f"tcp://{server}"


@dataclass(slots=True)
class Standing:
    """A server to be measured. pids: of the processes that are this tool's own to pin."""

    endpoints: dict[str, str]  # "ipc", "tcp" → endpoint, those there are
    model: str
    folder: Path
    key: Path | None
    pids: list[int]
    stack: ExitStack

    def connect(self, transport: str, *, lane: bool = False) -> Server:
        """A client that ends with the measurement. lane: with the lane, where there is one."""
        return self.stack.enter_context(
            djinn.connect(self.endpoints[transport], key=self.key, progress=None, lane=lane)
        )


@contextmanager
def standing(place: Place) -> Iterator[Standing]:
    """The server that *place* names, or an own one. Raises Unreachable, UnknownModel."""
    with ExitStack() as stack:
        folder = stack.enter_context(serving.sockets_folder())
        if place.server is not None:
            scheme = place.server.partition("://")[0]
            found = Standing({scheme: place.server}, "", folder, place.key, [], stack)
            with found.connect(scheme) as server:
                loaded = [model.name for model in server.status().models]
            found.model = place.model or (loaded[0] if loaded else serving.MODEL)
            yield found
            return
        served = stack.enter_context(
            serving.own_server(
                folder,
                f"--threads={place.threads}",
                model=place.model or serving.MODEL,
                shape=place.shape,
                device=place.device,
            )
        )
        endpoints = {"ipc": served.ipc, "tcp": served.tcp}
        yield Standing(endpoints, served.model, folder, place.key, list(served.pids), stack)


def stopped(model: Model, positions: int, layer: int | None) -> Checkpoint:
    """A run over *positions* random token ids, stopped after *layer* (None: in the middle).

    Raises LayerError, PromptError.
    """
    ids = np.random.default_rng(SEED).integers(0, model.vocab_size, (1, positions))
    point: Checkpoint = model.run(
        ids, stop_at=model.num_layers // 2 if layer is None else layer
    ).checkpoint
    return point


# ---- measuring and reporting


def begin(tool: str, asked: Asked, settings: Mapping[str, Any]) -> Results:
    results = Results(tool, this_machine(), asked.as_settings() | dict(settings))
    click.echo(f"{results.machine}\n")
    return results


def take(
    asked: Asked, cases: Mapping[str, Case | Task], pids: Sequence[int], results: Results
) -> dict[str, Samples]:
    """Time all *cases* in turns, this process on one CPU and *pids* on another."""
    client_cpus, server_cpus = pinning.two_sides() if asked.pin else (None, None)
    pinned = [pinning.pin("client", [os.getpid()], client_cpus)]
    if pids:
        pinned.append(pinning.pin("servers", pids, server_cpus))
    results.pinned += pinned
    plan = asked.plan
    with (
        interrupted.written(results, asked.json),
        progress.steps("measuring", plan.rounds * len(cases)) as tell,
    ):
        return interleaved(cases, plan, on_turn=tell, into=results.samples)


def finish(asked: Asked, results: Results, draw: Callable[[], Any] | None = None) -> None:
    """Say what was not measured, write what was asked for. draw: makes the figure."""
    for one in results.not_measured:
        click.echo(str(one))
    if asked.json is not None:
        write(results, asked.json)
        click.echo(f"results in {asked.json}")
    if asked.plot is not None:
        from djinn_zmq.probe import drawing

        figure = draw() if draw else drawing.distributions(results.bench, results.samples)
        drawing.save(figure, asked.plot, results)
        click.echo(f"figure in {asked.plot}")


def show(title: str, results: Results, unit: str = "us") -> None:
    click.echo(tables.of_samples(title, results.samples, unit))
