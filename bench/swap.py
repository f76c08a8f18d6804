"""How fast do keys and values of stopped conversations leave the GPU, and come back?

`python -m bench.swap --shape llama-2-13b --device cuda:0`
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

import djinn_zmq as djinn
from bench.plain import config_of, device_of, kv_nbytes
from djinn_zmq.client.server import Server
from djinn_zmq.client.talk import Session
from djinn_zmq.engine.models import shapes
from djinn_zmq.errors import Lost, RequestError
from djinn_zmq.probe import command, interrupted, serving, tables
from djinn_zmq.probe.device_time import waits
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import NotMeasured, Results, write
from djinn_zmq.probe.samples import Samples, ratio
from djinn_zmq.probe.targets import Target
from djinn_zmq.settings import MIB
from djinn_zmq.wire.tiers import Event

LIMIT = 0.9  # of the bare copies' rate
MOVES = "keys and values"  # in the text of such an event
WITHIN_S = 30.0  # a move that takes longer is not coming
SEED = 5
ENOUGH = 0.9  # of a conversation: what leaves is counted in layers
OUT, IN, BOTH = "out", "in", "both at once"


# ---- the bare copies


@dataclass(slots=True)
class Copies:
    """nbytes of pinned host memory and as much on the device, twice: for each direction its own."""

    device: torch.device
    nbytes: int
    host: list[torch.Tensor] = field(default_factory=list)
    there: list[torch.Tensor] = field(default_factory=list)
    streams: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        for _ in range(2):
            self.host.append(torch.zeros(self.nbytes, dtype=torch.uint8, pin_memory=cuda))
            self.there.append(torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device))
            self.streams.append(torch.cuda.Stream(self.device) if cuda else None)

    def run(self, *ways: str) -> None:
        for way in ways:
            place = (OUT, IN).index(way)
            pair = self.host[place], self.there[place]
            to, source = pair if way == OUT else pair[::-1]
            with torch.cuda.stream(self.streams[place]):  # type: ignore[arg-type]
                to.copy_(source, non_blocking=True)
        waits(self.device)()


# ---- what Djinn moves


@dataclass(slots=True)
class Talks:
    """Conversations of *tokens* tokens; those that are not in use are swapped out."""

    server: Server
    model: djinn.Model
    tokens: int
    made: int = 0
    seen: int = 0  # the number of the last event that was looked at

    def new(self) -> Session:
        """A session whose keys and values are on the device; others give way behind it."""
        self.made += 1
        ids = np.random.default_rng(SEED + self.made).integers(
            0, self.model.vocab_size, self.tokens
        )
        session = self.model.session()
        session.run(ids, logits="none")
        return session

    def moves(self, ended: Callable[[list[Event]], bool]) -> list[Event]:
        """The moves since the last look, when *ended* says that there are enough."""
        found: list[Event] = []
        limit = time.monotonic() + WITHIN_S
        while not ended(found):
            if time.monotonic() > limit:
                raise Lost(
                    f"{len(found)} moves of keys and values in {WITHIN_S:g} s: more were due"
                )
            for event in self.server.events(self.seen).so_far():
                self.seen = event.number
                if MOVES in event.text and event.nbytes:
                    found.append(event)
        return found


def moved(events: Sequence[Event], kind: str) -> int:
    return sum(one.nbytes for one in events if one.kind == kind)


def busy_s(events: Sequence[Event]) -> float:
    """Seconds in which at least one of *events* was under way; each tells its end and duration."""
    spans = sorted((one.unix_s - one.elapsed_ns / 1e9, one.unix_s) for one in events)
    total, reached = 0.0, 0.0
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def measure(
    talks: Talks, copies: Copies, rounds: int, nbytes: int, taken: dict[str, list[float]]
) -> None:
    """Fill *taken*: seconds a byte of each way, bare and Djinn's, a sample a round, so that a ratio of
    them is one of rates. nbytes: keys and values of one conversation; there is room for two."""

    def note(name: str, seconds: float, count: int) -> None:
        taken.setdefault(name, []).append(seconds / count)

    first, second = talks.new(), talks.new()
    for _ in range(rounds):
        for name, ways in ((OUT, (OUT,)), (IN, (IN,)), (BOTH, (OUT, IN))):
            begin = time.perf_counter()
            copies.run(*ways)
            note(f"bare, {name}", time.perf_counter() - begin, len(ways) * copies.nbytes)
        third = talks.new()  # no room for three: the first goes
        events = talks.moves(lambda found: moved(found, "evict") >= ENOUGH * nbytes)
        out = [one for one in events if one.kind == "evict"]
        note(OUT, busy_s(out), moved(out, "evict"))
        second.close()
        first.back_soon()
        events = talks.moves(lambda found: moved(found, "prefetch") >= ENOUGH * nbytes)
        back = [one for one in events if one.kind == "prefetch"]
        note(IN, busy_s(back), moved(back, "prefetch"))
        third.close()
        first.close()
        first, second = talks.new(), talks.new()
        both = _both_ways(talks, first, second, nbytes)
        note(BOTH, busy_s(both), sum(one.nbytes for one in both))
        first, second = talks.new(), talks.new()


def _both_ways(talks: Talks, first: Session, second: Session, nbytes: int) -> list[Event]:
    """One conversation comes back while another leaves; all are closed then."""
    third = talks.new()
    talks.moves(lambda found: moved(found, "evict") >= ENOUGH * nbytes)  # the first is out
    first.back_soon()  # it comes back, and the second leaves meanwhile: there is room for two
    events = talks.moves(
        lambda found: (
            moved(found, "evict") >= ENOUGH * nbytes and moved(found, "prefetch") >= ENOUGH * nbytes
        )
    )
    for session in (first, second, third):
        session.close()
    return events


# ---- the command


@contextmanager
def standing(model: str, device: str, tokens: int, kv: int) -> Iterator[Talks]:
    """A server whose device has room for two conversations; kv: bytes of one."""
    if 2 * kv < MIB:
        raise RequestError(
            f"{tokens} tokens of {model} are {kv:,} bytes of keys and values: a device's budget is at "
            "least 1 MiB, and two must fill it"
        )
    shape = model if model in shapes.names() else None
    with serving.sockets_folder() as folder:
        served = serving.own_server(
            folder, f"--gpu-memory={2 * kv // MIB}", "--threads=1",
            model=model, shape=shape, device=device,
        )  # fmt: skip
        with served as one, djinn.connect(one.ipc, progress=None) as server:
            yield Talks(server, server.model(one.model), tokens)


def tell(results: Results, taken: dict[str, list[float]], limit: float | None) -> None:
    """What *taken* says: a rate is the reciprocal of seconds a byte."""
    results.samples = [
        Samples.of(f"{name}, seconds a byte", each, {"way": name}) for name, each in taken.items()
    ]
    by_way = {str(one.labels["way"]): one for one in results.samples}
    results.ratios = [
        ratio(
            by_way[f"bare, {way}"], by_way[way], name=f"swap {way} / bare copies' rate",
            limit=limit, at_least=True,
        )
        for way in (OUT, IN, BOTH)
        if way in by_way
    ]  # fmt: skip
    results.tables["rates"] = [
        {"way": name, "gb_per_s": 1e-9 / one.median_s, "n": one.n} for name, one in by_way.items()
    ]


@click.command(cls=command.Tool)
@click.option(
    "--shape",
    default="llama-2-13b",
    show_default=True,
    help="Random weights of it, or a served name.",
)
@click.option("--device", default="cuda:0", show_default=True, help='"cuda:N" or "cpu".')
@click.option("--positions", type=click.IntRange(1), default=1031, show_default=True,
              help="Tokens of each conversation.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(2), default=8, show_default=True,
              help="In each all ways take their turn once.")  # fmt: skip
@click.option("--json", "path", type=Target(), help="Write results here.")
def main(shape: str, device: str, positions: int, rounds: int, path: Path | None) -> None:
    """The rate at which stopped conversations are swapped, against bare copies of as many bytes.

    A conversation too many, and the one that was unused for longest leaves the device; it is said to be
    back soon, and comes. Djinn's rate is told by its own events: bytes, and how long the move took in
    the engine. Bare: one pinned tensor of that size, one way and both at once, in this process, taking
    turns. Target: at least 0.9 of the bare rate each way.
    """
    torch.set_num_threads(1)
    device_of(device)
    config = config_of(shape)
    nbytes = kv_nbytes(config, positions, config.num_hidden_layers)
    results = Results(
        "swap", this_machine(),
        {"shape": shape, "device": device, "positions": positions, "rounds": rounds, "nbytes": nbytes},
    )  # fmt: skip
    click.echo(f"{results.machine}\n")
    on_gpu = device != "cpu"
    if not on_gpu:
        why = "no GPU: copies within host memory stand in its place"
        results.not_measured.append(NotMeasured("swapping over PCIe", why))
    taken: dict[str, list[float]] = {}
    with (
        interrupted.written(results, path),
        standing(shape, device, positions, nbytes) as talks,
    ):
        copies = Copies(torch.device(device), nbytes)
        try:
            measure(talks, copies, rounds, nbytes, taken)
        finally:
            tell(results, taken, LIMIT if on_gpu else None)
    columns = [f"{nbytes:,} bytes", "GB/s", "n"]
    rows = results.tables["rates"]
    shown = [[row["way"], f"{row['gb_per_s']:.1f}", str(row["n"])] for row in rows]
    click.echo(tables.aligned(columns, shown))
    click.echo("\n" + tables.of_ratios("rates", results.ratios))
    if path is not None:
        write(results, path)
        click.echo(f"results in {path}")


if __name__ == "__main__":
    main(prog_name="python -m bench.swap")
