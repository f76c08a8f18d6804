"""The resume experiment: every baseline beside Djinn, at every layer, in one run.

`python -m bench.resume_latency --config bench/configs/llama-2-13b.yaml`
"""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import djinn_zmq as djinn
from bench import (
    bare,
    config,
    djinn_resume,
    eager,
    manual_offload,
    nnsight_steer,
    prototype_transport,
    recompute,
    report,
    saving,
)
from bench.cases import Found, Timed, working
from bench.config import ResumeLatency
from bench.kept_rounds import KeptRounds
from bench.plain import Plain, device_of
from djinn_zmq.engine.models import shapes
from djinn_zmq.errors import LayerError, Lost
from djinn_zmq.probe import command, pinning, progress, serving
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Check, NotMeasured, Results
from djinn_zmq.probe.rounds import Plan, each_round

SEED = 7  # of the prompt's ids
LONG_IDLE_MS = 10  # after which nothing that the turn before left in the caches is there any more


class Experiment(command.Tool):
    """Takes `--layers 1 10 20` as well as `--layers 1 --layers 10`."""

    MANY = ("--layers", "--without", "--baselines", "--transports", "--edits", "--ends", "--tiers")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("--"):
                option = arg if arg in self.MANY else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _many(name: str, allowed: Sequence[str], about: str) -> Any:
    return click.option(
        f"--{name}", multiple=True, type=click.Choice(allowed), help=f"{about} [default: all]"
    )


@click.command(cls=Experiment)
@click.option("--config", "path", type=click.Path(path_type=Path), help="YAML file to start from.")
@click.option("--model", help="A shape (random weights), a served name, a directory, a hub id.")
@click.option("--layers", type=int, multiple=True, help="To stop at: --layers 1 10 20. [five]")
@click.option("--max-length", type=int, help="Tokens of the prompt.")
@click.option("--server", help="A running server, HOST:PORT or an endpoint. [an own one]")
@click.option("--key", type=click.Path(), help="Your key file, for a server that wants one.")
@click.option("--device", help='For an own server and the baselines: "cpu" or "cuda:N". [auto]')
@click.option("--dtype", help="Type of the weights; auto: as they are stored.")
@click.option("--threads", type=int, help="On a CPU: of the engine, and of the baselines.")
@click.option("--warmup", type=int, help="Untimed calls of each case.")
@click.option("--repeat", type=int, help="Rounds in which all cases take their turn.")
@click.option("--per-turn", type=int, help="Timed calls of a case in each of its turns.")
@click.option("--idle-ms", type=float, help="Milliseconds of sleep before each call. [0]")
@click.option("--spin-us", type=int, help="Ends that stay awake so long after a message. [0: none]")
@click.option("--without", multiple=True, help="Leave out cases whose name contains this.")
@click.option("--output-dir", help="Where the results go.")
@_many("baselines", config.BASELINES, "What to measure.")
@_many("transports", config.TRANSPORTS, "Ways to the server.")
@_many("edits", config.EDITS, "What is edited: nothing, one row, all.")
@_many("ends", config.ENDS, "How far a resume goes.")
@_many("tiers", config.TIERS, "Where the checkpoint lies.")
@click.option("--every-combination", is_flag=True, default=None, help="All of these with all.")
@click.option("--fresh", is_flag=True, help="Begin anew, also where rounds of before are there.")
def main(path: Path | None, fresh: bool, **given: Any) -> None:
    """What does it cost to go on from layer N? Recompute, offload by hand, eager, nnsight, the
    prototype's transport, and Djinn, on the same weights and prompt, taking turns.

    \b
      python -m bench.resume_latency --config bench/configs/llama-2-13b.yaml
      python -m bench.resume_latency --model tiny --device cpu --max-length 32
      python -m bench.resume_latency --model llama-2-13b --layers 1 10 20 30 40 --max-length 2048 \\
          --server 127.0.0.1:5556 --output-dir DIR --warmup 3 --repeat 5

    Options stand above the file's keys. Writes recompute_latency.json, manual_offload_latency.json,
    djinn_resume_latency.json, and all of it as resume_latency.json. Each round is kept in
    rounds.jsonl as soon as it is taken: after an interruption the same command goes on. What cannot
    be measured on this machine is reported by name.
    """
    over = {key: value for key, value in given.items() if value not in (None, ())}
    run(config.read(ResumeLatency, path, over), fresh=fresh)


def run(asked: ResumeLatency, *, fresh: bool = False) -> Results:
    """Measure, write, report. Raises ClickException where the server went in mid-benchmark: then
    what was taken until then is written."""
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {one.name: getattr(asked, one.name) for one in fields(asked)}
    results = Results("resume_latency", this_machine(), _plain_values(settings))
    click.echo(f"{results.machine}\n")
    begin = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        bench = _Bench(asked, results, stack)
        cases = bench.cases()
        kept = KeptRounds(folder / "rounds.jsonl", results, [one.name for one in cases])
        done = kept.load(fresh=fresh)
        if done:
            click.echo(f"going on after {done} of {asked.repeat} rounds in {kept.path}")
        try:
            _measure(bench, cases, kept)
        except (Lost, ConnectionError) as exc:
            _write(bench, cases, kept, folder)
            raise click.ClickException(
                f"the server is gone in mid-benchmark ({exc}); {kept.count} of {asked.repeat} rounds "
                f"are kept in {kept.path}: the same command goes on from there"
            ) from exc
        except KeyboardInterrupt:
            _write(bench, cases, kept, folder)
            click.echo(f"\n{kept.count} of {asked.repeat} rounds are kept in {kept.path}", err=True)
            raise
        results.settings["elapsed_s"] = round(time.monotonic() - begin, 1)
        _write(bench, cases, kept, folder)
    report.show(results)
    click.echo(f"\n{time.monotonic() - begin:.0f} s, results in {folder}")
    return results


class _Bench:
    """The server, its clients, the same model in this process, and the prompt."""

    def __init__(self, asked: ResumeLatency, results: Results, stack: ExitStack) -> None:
        self.asked = asked
        self.results = results
        self.plain: Plain | None = None
        self._stack = stack
        self._clients = [os.getpid()]
        self._servers: list[int] = []
        if asked.server is None:
            if asked.spin_us:
                pinning.check_spinning()
            self.asked = asked = self._on(device_of(asked.device))
        endpoints, name = self._serve()
        self.djinn = djinn_resume.connect(endpoints, asked, name, stack)
        model = self.djinn.first.model
        self.asked = asked = self._on(device_of(asked.device, model.device))
        self.layers = _layers(asked.layers, model.num_layers, model.name)
        ids = np.random.default_rng(SEED).integers(0, model.vocab_size, (1, asked.max_length))
        self.ids = ids
        djinn_resume.save(self.djinn, ids, self.layers)
        self.plain = Plain(model.info.source, asked.dtype, asked.device, ids, asked.threads)
        self._check_exact()
        results.settings |= {
            "served": model.name,
            "num_layers": model.num_layers,
            "layers": self.layers,
            "activation_nbytes": self.plain.activation_nbytes,
            "on": model.device,
        }

    def _on(self, device: str) -> ResumeLatency:
        self.results.settings["device"] = device
        return replace(self.asked, device=device)

    def _serve(self) -> tuple[dict[str, str], str]:
        asked = self.asked
        shape = asked.model if asked.model in shapes.names() else None
        if asked.server is not None:
            endpoint = command.endpoint_of(asked.server)
            assert endpoint is not None
            return _endpoints(endpoint, asked.key), asked.model
        folder = self._stack.enter_context(serving.sockets_folder())
        served = self._stack.enter_context(
            serving.own_server(
                folder,
                f"--threads={asked.threads}",
                f"--spin-us={asked.spin_us}",
                *tier_options(asked.device, self._stack.enter_context(serving.sockets_folder())),
                model=asked.model,
                shape=shape,
                device=asked.device,
                dtype=asked.dtype,
            )
        )
        self._servers += served.pids
        return {"ipc": served.ipc, "tcp": served.tcp}, served.model

    def _check_exact(self) -> None:
        assert self.plain is not None
        equal, count = djinn_resume.exact(self.djinn, self.plain.last_logits())
        check = Check(
            "unedited resumes give the bits of the plain model of this process",
            equal == count,
            f"{equal} of {count} resumes",
        )
        self.results.checks.append(check)
        click.echo(check)
        if not check.held:
            raise click.ClickException(
                f"{count - equal} of {count} resumes differ from the plain model: nothing is measured"
            )

    def cases(self) -> list[Timed]:
        """Those that work; the others are noted in the results."""
        plain, layers = self.plain, self.layers
        assert plain is not None
        makers = {
            "recompute": lambda: recompute.cases(plain, layers),
            "manual_offload": lambda: manual_offload.cases(plain, layers),
            "eager": lambda: eager.cases(plain, layers),
            "djinn": lambda: djinn_resume.cases(self.djinn, self.asked),
            "saving": lambda: saving.cases(self.djinn, self.ids),
            "nnsight": lambda: nnsight_steer.cases(plain, layers),
            "prototype": self._prototype,
            "bare": self._bare,
        }
        found: Found = []
        for name, make in makers.items():
            if name in self.asked.baselines:
                found += make()
        found = [one for one in found if not any(text in _name(one) for text in self.asked.without)]
        cases, missing = working(found, (Lost, ConnectionError))
        self.results.not_measured += missing
        for one in missing:
            click.echo(str(one))
        for spans in self.djinn.spans.values():
            spans.clear()
        return cases

    def _prototype(self) -> Found:
        assert self.plain is not None
        found, clients, servers = self._stack.enter_context(
            prototype_transport.cases(self.plain.activation_nbytes)
        )
        self._clients += clients
        self._servers += servers
        return found

    def _bare(self) -> Found:
        folder = self._stack.enter_context(serving.sockets_folder())
        found, servers = self._stack.enter_context(bare.cases(folder))
        self._servers += servers
        return found

    def pin(self) -> None:
        """Only on a CPU: a GPU's host has CPUs to spare, and torch's threads want them. Nor where server
        and engine spin: each wants a CPU of its own."""
        alone = self.asked.device == "cpu" and not self.asked.spin_us
        client, servers = pinning.two_sides() if alone else (None, None)
        self.results.pinned.append(pinning.pin("clients and baselines", self._clients, client))
        if self._servers:
            self.results.pinned.append(pinning.pin("servers", self._servers, servers))


def tier_options(device: str, state: Path) -> list[str]:
    """Of a server all of whose tiers are to be measured. A CPU engine has a device tier only where it
    is told to: plain memory, for the sake of the same case."""
    return [f"--state={state}", *(["--gpu-memory=256"] if device == "cpu" else [])]


def _measure(bench: _Bench, cases: list[Timed], kept: KeptRounds) -> None:
    asked = bench.asked
    bench.pin()
    plan = Plan(
        asked.repeat, asked.per_turn, asked.idle_ms / 1e3, asked.warmup,
        settle=1 if asked.idle_ms >= LONG_IDLE_MS else 2,
        there_and_back=True,
    )  # fmt: skip
    tasks = {one.name: one.task for one in cases}
    total = plan.rounds * len(tasks)
    with progress.steps("measuring", total, done=kept.count * len(tasks)) as tell:
        for taken in each_round(tasks, plan, first=kept.count, on_turn=tell):
            kept.add(taken)


def _write(bench: _Bench, cases: list[Timed], kept: KeptRounds, folder: Path) -> None:
    """What the rounds so far say; nothing where there is none yet."""
    if not kept.count:
        return
    results = bench.results
    results.samples = kept.samples({one.name: one.labels for one in cases})
    results.settings |= {"rounds_taken": kept.count, "sittings": kept.sittings}
    if kept.count < bench.asked.repeat:
        what = f"rounds {kept.count + 1} to {bench.asked.repeat}"
        results.not_measured.append(NotMeasured(what, "the run was interrupted"))
    results.tables |= djinn_resume.spans_table(bench.djinn, kept.count * bench.asked.per_turn)
    report.add_findings(results)
    report.write_all(results, folder)


def _name(one: Timed | NotMeasured) -> str:
    return one.name if isinstance(one, Timed) else one.what


def _layers(asked: Sequence[int], count: int, model: str) -> list[int]:
    """Raises LayerError for one that the model does not have."""
    for layer in asked:
        if layer > count:
            raise LayerError(
                f'layer {layer} does not exist: "{model}" has {count} layers (0-{count})'
            )
    return sorted(set(asked)) or config.spread(count)


def _endpoints(endpoint: str, key: str | None) -> dict[str, str]:
    """The one that was named, and what else of that server this program can use: its own socket."""
    found = {endpoint.partition("://")[0]: endpoint}
    options = {} if key is None else {"key": Path(key)}
    with djinn.connect(endpoint, progress=None, **options) as server:
        for other in server.status().endpoints:
            scheme, _, place = other.partition("://")
            if scheme == "tcp" or os.access(place, os.W_OK):
                found.setdefault(scheme, other)
    return found


def _plain_values(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()
    }


if __name__ == "__main__":
    main(prog_name="python -m bench.resume_latency")
