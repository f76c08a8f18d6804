"""An activation to the server: `python -m bench.upload`. The question behind it: is it the copy?"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import numpy as np

import djinn_zmq as djinn
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.model import Model
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.probe import command, echoes, interrupted, pinning, tables
from djinn_zmq.probe.machine import this_machine
from djinn_zmq.probe.results import Results, write
from djinn_zmq.probe.rounds import Plan, interleaved
from djinn_zmq.probe.samples import ratio
from djinn_zmq.probe.serving import MODEL, Served, own_server, sockets_folder
from djinn_zmq.probe.targets import Target
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot

SHAPE = (1031, 5120)  # positions, hidden size: one activation of Llama-2-13B
ITEMSIZE = 2  # bytes of a bfloat16
MB = 1_000_000

RAW = "tcp: raw socket"
SLOT = "ipc: slot"
IPC_FRAMES = "ipc: frames"
TCP_FRAMES = "tcp: frames"
LIMITS = {SLOT: 0.3, IPC_FRAMES: None, TCP_FRAMES: 1.2}  # times the raw socket

FULL, QUICK = 200, 20  # samples of each case


def upload(model: Model, array: np.ndarray) -> Operation[None]:
    """Bring *array* to the server as a run's tensor would be brought, until it is said to be there.

    In frames, the server answers when the last byte is in its place. In a slot it is in place once
    it is copied, and a no-op to the engine, which reads it there, stands for the request.
    """
    connection = model.connection
    parcel = Parcel(connection, model.session_id)
    tensor = yield from parcel.place(array)
    if isinstance(tensor.where, Slot):
        yield Call(Op.PING, messages.Ping(), session=model.session_id)
    parcel.settle()


@contextmanager
def cases(
    served: Served, array: np.ndarray
) -> Iterator[tuple[dict[str, Callable[[], object]], list[int]]]:
    """Every case as a call that uploads once; and the pid of the raw receiver."""
    ways = ((SLOT, served.ipc, True), (IPC_FRAMES, served.ipc, False))
    with ExitStack() as stack:
        address, pid = stack.enter_context(echoes.running("tcp"))
        calls = {RAW: stack.enter_context(_raw(address, array))}
        for name, endpoint, shared in (*ways, (TCP_FRAMES, served.tcp, False)):
            server = stack.enter_context(djinn.connect(endpoint, shared=shared, progress=None))
            calls[name] = _through(server.model(MODEL), array)
        yield calls, [pid]


def _through(model: Model, array: np.ndarray) -> Callable[[], object]:
    return lambda: model.drive(upload(model, array))


@contextmanager
def _raw(address: str, array: np.ndarray) -> Iterator[Callable[[], object]]:
    host, _, port = address.partition(":")
    data = memoryview(array.view(np.uint8).data).cast("B")
    head = echoes.HEAD.pack(len(data))
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def call() -> None:
            connection.sendall(head)
            connection.sendall(data)
            if connection.recv(64) != echoes.ACK:
                raise ConnectionError("the raw receiver is gone")

        yield call


@click.command(cls=command.Tool)
@click.option(
    "--samples",
    type=click.IntRange(4),
    help=f"Uploads of each case. [default: {FULL}; quick: {QUICK}]",
)
@click.option("--pin/--no-pin", default=True, help="Client on one CPU, servers on another. [yes]")
@click.option("--json", "path", type=Target(), help="Write results here.")
@click.option("--quick", is_flag=True, help="A few seconds; intervals get wide.")
def main(samples: int | None, pin: bool, path: Path | None, quick: bool) -> None:
    """How long until the server has an activation of 10.56 MB (1031 x 5120 x 2 bytes)?

    \b
    raw socket    sendall, received into memory that was there before, an acknowledgement
    ipc: slot     copied into the client's shared arena, and a no-op to the engine that reads it
    ipc: frames   in messages of 1 MiB over the bus, as for a client that shares no memory
    tcp: frames   the same over TCP, as for a remote client

    All through the client's own code. Targets, at the median: the slot at most 0.3 times the raw
    socket, TCP frames at most 1.2 times. All cases take turns; intervals are 95 % bootstrap
    intervals over rounds. Takes half a minute.
    """
    count = samples or (QUICK if quick else FULL)
    client_cpus, server_cpus = pinning.two_sides() if pin else (None, None)
    array = np.random.default_rng(0).integers(0, 1 << 15, SHAPE, np.uint16).view(np.float16)
    assert array.nbytes == SHAPE[0] * SHAPE[1] * ITEMSIZE
    settings = {"samples": count, "quick": quick, "nbytes": array.nbytes}
    results = Results("upload", this_machine(), settings)
    click.echo(results.machine)
    begin = time.monotonic()
    pinning.pin("client", [os.getpid()], client_cpus)  # threads to come inherit it
    with (
        sockets_folder() as folder,
        own_server(folder) as served,
        cases(served, array) as (calls, pids),
    ):
        results.pinned += [
            pinning.pin("client", [os.getpid()], client_cpus),
            pinning.pin("servers", [*served.pids, *pids], server_cpus),
        ]
        click.echo("\n" + "\n".join(str(one) for one in results.pinned))
        with interrupted.written(results, path):
            plan = Plan.of(count, 20, warm_up=3, settle=1)
            taken = interleaved(calls, plan, into=results.samples)
    results.ratios += [
        ratio(taken[name], taken[RAW], limit=limit) for name, limit in LIMITS.items()
    ]
    title = f"{array.nbytes / MB:.2f} MB"
    click.echo("\n" + tables.of_samples(title, list(taken.values()), "ms"))
    click.echo("\n" + tables.of_ratios("at the median", results.ratios))
    if path is not None:
        write(results, path)
    click.echo(f"\n{time.monotonic() - begin:.0f} s" + (f", results in {path}" if path else ""))


if __name__ == "__main__":
    main(prog_name="python -m bench.upload")
