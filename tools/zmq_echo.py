"""What does ZeroMQ add to a socket here? `python -m tools.zmq_echo`."""

from contextlib import ExitStack

import click

from djinn_zmq.probe import command, echoes, serving, tables
from djinn_zmq.probe.command import Asked
from djinn_zmq.probe.rungs import connected, dealing, pieces_call, raw_call
from djinn_zmq.probe.samples import ratio

RAW = {"ipc": "AF_UNIX, raw socket", "tcp": "tcp, raw socket"}
BARE = {"ipc": "ipc, DEALER to ROUTER", "tcp": "tcp, DEALER to ROUTER"}


@click.command(cls=command.Tool)
@command.measuring(samples=1000)
@click.option(
    "--nbytes",
    type=click.IntRange(8, 1 << 30),
    default=64,
    show_default=True,
    help="Bytes sent up in each call; above 1 MiB in messages of 1 MiB, as Djinn sends bulk.",
)
def zmq_echo(asked: Asked, nbytes: int) -> None:
    """A bare ROUTER in another process, over ipc and tcp, beside raw sockets that carry the same.

    This is the least a program on ZeroMQ can cost: no messages of its own, no loop, no work. What
    Djinn's no-op takes beyond it is Djinn's (`python -m tools.noop`).

    \b
      python -m tools.zmq_echo
      python -m tools.zmq_echo --nbytes 10557440 --samples 100
      python -m tools.zmq_echo --idle-ms 2 --plot echo.png
    """
    results = command.begin("zmq_echo", asked, {"nbytes": nbytes})
    data = memoryview(bytes(nbytes))
    with ExitStack() as stack:
        folder = stack.enter_context(serving.sockets_folder())
        cases, pids = {}, []
        for transport in ("ipc", "tcp"):
            raw = ("unix", f"{folder}/raw") if transport == "ipc" else ("tcp",)
            address, pid = stack.enter_context(echoes.running(*raw))
            pids.append(pid)
            cases[RAW[transport]] = raw_call(stack.enter_context(connected(address)), data)
            bound = f"ipc://{folder}/echo" if transport == "ipc" else "tcp://127.0.0.1:*"
            endpoint, pid = stack.enter_context(echoes.running("pieces", bound))
            pids.append(pid)
            cases[BARE[transport]] = pieces_call(stack.enter_context(dealing(endpoint)), data)
        taken = command.take(asked, cases, pids, results)
    results.ratios += [ratio(taken[BARE[way]], taken[RAW[way]]) for way in RAW]
    command.show(f"{nbytes:,} bytes up", results)
    click.echo("\n" + tables.of_ratios("at the median", results.ratios))
    command.finish(asked, results)


if __name__ == "__main__":
    zmq_echo(prog_name="python -m tools.zmq_echo")
