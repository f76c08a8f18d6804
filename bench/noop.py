"""What a no-op costs: `python -m bench.noop`. The question behind it: what does Djinn add?"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from bench import grpc_echo, load, roundtrips, spinning
from bench.roundtrips import DJINN, DOORBELL, FRONT, LANE, ROUTER, TRANSPORTS
from djinn_zmq.probe import command, echoes, interrupted, pinning, tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import Ratio, Samples, ratio
from djinn_zmq.probe.serving import Served, own_server, sockets_folder
from djinn_zmq.probe.targets import Target

NOOP_LIMIT = 1.3  # times the bare front and PAIR
ROUTER_LIMIT = 1.4  # over tcp, times a bare single ROUTER
LANE_LIMIT = 2.0  # times the bare doorbell
GRPC_FACTOR = 5.0  # times gRPC's requests a second
GRPC_CLIENTS = 64  # at which the factor is wanted


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. windows, window_s: of the many-clients part, for each case."""

    samples: int
    windows: int
    window_s: float

    def plans(self) -> list[Plan]:
        """Back to back, and with idle gaps: these take their time, so they take fewer samples."""
        return [
            Plan.of(self.samples, 20),
            Plan.of(max(10, self.samples // 5), 20, gap_s=0.002),
            Plan.of(max(4, self.samples // 40), 10, gap_s=0.05, settle=1, warm_up=1),
        ]


FULL = Size(2000, 5, 0.5)
QUICK = Size(200, 2, 0.2)


# ---- one client


def measure_round_trips(
    calls: dict[str, roundtrips.Call],
    size: Size,
    results: Results,
    spins: Sequence[spinning.Spinning] = (),
    pids: tuple[int, ...] = (),
) -> None:
    """pids: of the server and the engine that do not spin."""
    for plan in size.plans():
        gap = f"{plan.gap_s * 1e3:g} ms idle" if plan.gap_s else "back to back"
        awake = spinning.over(plan.gap_s, spins)
        more, busy = {}, None
        if awake is not None:
            more = {awake.named(one): call for one, call in awake.calls.items() if one in calls}
            own = dict.fromkeys(awake.calls, pids) | dict.fromkeys(more, awake.pids)
            busy = spinning.Busy(own)
        taken = interleaved(calls | more, plan, on_turn=busy)
        click.echo("\n" + tables.of_samples(f"no-op, {gap}", list(taken.values())))
        found = list(_ratios(taken, gap, ""))
        if awake is not None and busy is not None:
            found += _ratios(taken, gap, awake.named(""))
            for case in (*filter(calls.__contains__, awake.calls), *more):
                way, spin = case.partition(":")[0], awake.named("") if case in more else ""
                found.append(
                    busy.ratio_of(
                        case, f"{way}, {gap}{spin}: cores that server and engine keep busy"
                    )
                )
        click.echo("\n" + tables.of_ratios("at the median", found))
        results.samples += [Samples(f"{gap}, {k}", v.seconds) for k, v in taken.items()]
        results.ratios += found


def _ratios(taken: dict[str, Samples], gap: str, spin: str) -> Iterator[Ratio]:
    """To what each case is held against; without a limit where its ends spin."""
    pairs = [
        (way, DJINN.format(way), FRONT.format(way), "bare front and PAIR", NOOP_LIMIT)
        for way in TRANSPORTS
    ]
    pairs.append(("tcp", DJINN.format("tcp"), ROUTER.format("tcp"), "bare ROUTER", ROUTER_LIMIT))
    pairs.append(("lane", LANE, DOORBELL, "bare doorbell", LANE_LIMIT))
    for way, ours, bare, below, limit in pairs:
        if (ours := ours + spin) in taken and bare in taken:
            name = f"{way}, {gap}{spin}: djinn / {below}"
            yield ratio(taken[ours], taken[bare], name=name, limit=None if spin else limit)


# ---- many clients


@contextmanager
def load_cases(
    served: Served, folder: Path, count: int
) -> Iterator[tuple[dict[str, load.Generator], list[int]]]:
    """Every case as a generator of load from up to *count* clients; and the pids of its servers."""
    cases: dict[str, load.Generator] = {}
    pids: list[int] = []
    with ExitStack() as stack:
        for transport in TRANSPORTS:
            endpoint = served.ipc if transport == "ipc" else served.tcp
            clients = stack.enter_context(load.djinn_clients(endpoint, count))
            cases[f"{transport}: djinn"] = clients
        front, both = stack.enter_context(
            echoes.front_and_back(f"ipc://{folder}/load-front", f"ipc://{folder}/load-back")
        )
        pids += both
        cases["ipc: bare ROUTER front and PAIR"] = stack.enter_context(load.dealers(front, count))
        for kind in grpc_echo.KINDS:
            address, pid = stack.enter_context(grpc_echo.running(kind))
            pids.append(pid)
            clients = stack.enter_context(load.grpc_clients(address, count))
            cases[f"tcp: gRPC python, {kind}"] = clients
        yield cases, pids


def measure_load(
    cases: dict[str, load.Generator], counts: Sequence[int], size: Size, results: Results
) -> None:
    for count in counts:
        windows: dict[str, list[load.Window]] = {name: [] for name in cases}
        for generate in cases.values():
            generate(count, size.window_s / 4)  # warm
        for _ in range(size.windows):
            for name, generate in cases.items():
                windows[name].append(generate(count, size.window_s))
        _report_load(count, windows, results)


def _report_load(count: int, windows: dict[str, list[load.Window]], results: Results) -> None:
    rows = [_load_row(count, name, taken) for name, taken in windows.items()]
    columns = [f"clients: {count}", "requests/s", "p50 us", "p99 us", "n", "windows"]
    click.echo("\n" + tables.aligned(columns, [_printed(row) for row in rows]))
    results.tables.setdefault("load", []).extend(rows)
    # Seconds a request, one sample a window: so that a ratio of rates is a ratio of medians.
    costs = {
        name: Samples.of(name, [one.elapsed_s / max(1, one.answers) for one in taken])
        for name, taken in windows.items()
    }
    best = min((one for name, one in costs.items() if "gRPC" in name), key=lambda s: s.median_s)
    found = [
        ratio(
            best,
            costs[f"{transport}: djinn"],
            name=f"{count} clients, {transport}: djinn / the better gRPC ({best.name})",
            limit=GRPC_FACTOR if count == GRPC_CLIENTS else None,
            at_least=True,
        )
        for transport in TRANSPORTS
    ]
    click.echo("\n" + tables.of_ratios("requests a second, n windows", found))
    results.samples += [
        Samples(f"{count} clients, {name}, seconds a request", one.seconds)
        for name, one in costs.items()
    ]
    results.ratios += found


def _load_row(count: int, name: str, taken: Sequence[load.Window]) -> dict[str, object]:
    latencies = np.concatenate([window.latencies_s for window in taken])
    return {
        "clients": count,
        "case": name,
        "requests_per_s": float(np.median([one.answers / one.elapsed_s for one in taken])),
        "p50_s": float(np.percentile(latencies, 50)),
        "p99_s": float(np.percentile(latencies, 99)),
        "n": len(latencies),
        "windows": len(taken),
    }


def _printed(row: dict[str, object]) -> list[str]:
    p50, p99 = (tables.number(float(str(row[key])) * 1e6) for key in ("p50_s", "p99_s"))
    rate = f"{float(str(row['requests_per_s'])):,.0f}"
    return [str(row["case"]), rate, p50, p99, f"{row['n']:,}", str(row["windows"])]


# ---- the command


@click.command(cls=command.Tool)
@click.option(
    "--samples",
    type=click.IntRange(20),
    help="Round trips of each case, back to back; with idle gaps 1/5 and 1/40 of it. "
    f"[default: {FULL.samples}; quick: {QUICK.samples}]",
)
@click.option(
    "--clients",
    "counts",
    type=click.IntRange(1, 256),
    multiple=True,
    default=(1, 8, 64, 256),
    show_default=True,
    help="Numbers of clients for requests a second; repeatable.",
)
@click.option(
    "--load/--no-load", "with_load", default=True, help="Also measure many clients. [default: yes]"
)
@click.option("--pin/--no-pin", default=True, help="Client on one CPU, servers on another. [yes]")
@click.option("--without", multiple=True, help="Leave out cases whose name contains this.")
@click.option(
    "--spin-us",
    "spins_us",
    type=click.IntRange(1),
    multiple=True,
    help="Also measure a server, and a client, that stay awake so long after a message. Repeatable: "
    "with each gap the shortest that reaches over it. Nothing is pinned then.",
)
@click.option("--json", "path", type=Target(), help="Write results here.")
@click.option("--quick", is_flag=True, help="Well under a minute; intervals get wide.")
def main(
    samples: int | None,
    counts: tuple[int, ...],
    with_load: bool,
    pin: bool,
    without: tuple[str, ...],
    spins_us: tuple[int, ...],
    path: Path | None,
    quick: bool,
) -> None:
    """What does Djinn add to a no-op? Its own server and engine against bare echoes.

    \b
    One client: the no-op of `Model.ping`, through client, server and engine, against
      bare ROUTER front and PAIR   two processes that only pass the same bytes on
      bare ROUTER                  one process, one socket
      raw socket                   TCP without ZeroMQ
    and over the lane, past the server, against
      bare doorbell                a word in shared memory and an eventfd each way
    over ipc and tcp, back to back and with the client asleep for 2 and 50 ms before each.
    Targets, at the median: at most 1.3 times the bare front and PAIR; over tcp 1.4 times a bare
    ROUTER; over the lane 2 times the bare doorbell. With --spin-us once more over lane and tcp, beside
    these and without a target, and how many cores server and engine keep busy, with it and without.

    \b
    Many clients: requests a second, each client in a closed loop, all of them in one process,
    against gRPC python (bytes in and out, sync and aio servers).
    Target: at least 5 times the better gRPC at 64 clients.

    All cases take turns in short rounds, so that they meet the same machine; intervals are 95 %
    bootstrap intervals over rounds. Takes two to three minutes, with --quick well under one.
    """
    size = QUICK if quick else FULL
    if samples is not None:
        size = Size(samples, size.windows, size.window_s)
    if spins_us:
        pinning.check_spinning()
    begin = time.monotonic()
    client_cpus, server_cpus = pinning.two_sides() if pin and not spins_us else (None, None)
    settings = {"samples": size.samples, "clients": list(counts), "quick": quick,
                "without": list(without), "spin_us": list(spins_us)}  # fmt: skip
    results = Results("noop", this_machine(), settings)
    click.echo(results.machine)
    pinning.pin("client", [os.getpid()], client_cpus)  # threads to come inherit it
    with (
        interrupted.written(results, path),
        sockets_folder() as folder,
        own_server(folder) as served,
    ):
        with roundtrips.cases(served, folder) as (calls, pids), spinning.servers(spins_us) as spins:
            awake = [pid for one in spins for pid in one.pids]
            _pin(results, [*served.pids, *pids, *awake], client_cpus, server_cpus)
            chosen = {k: v for k, v in calls.items() if not any(text in k for text in without)}
            measure_round_trips(chosen, size, results, spins, served.pids)
        if with_load:
            with load_cases(served, folder, max(counts)) as (cases, pids):
                _pin(results, [*served.pids, *pids], client_cpus, server_cpus)
                measure_load(cases, counts, size, results)
    if path is not None:
        write(results, path)
    click.echo(f"\n{time.monotonic() - begin:.0f} s" + (f", results in {path}" if path else ""))


def _pin(
    results: Results,
    servers: Sequence[int],
    client_cpus: tuple[int, ...] | None,
    server_cpus: tuple[int, ...] | None,
) -> None:
    pinned = [
        pinning.pin("client", [os.getpid()], client_cpus),
        pinning.pin("servers", servers, server_cpus),
    ]
    results.pinned += pinned
    click.echo("\n" + "\n".join(str(one) for one in pinned))


if __name__ == "__main__":
    main(prog_name="python -m bench.noop")
