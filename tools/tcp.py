"""What does the kernel's network stack cost here? `python -m tools.tcp`."""

from contextlib import ExitStack

import click

from djinn_zmq.probe import command, echoes, serving
from djinn_zmq.probe.command import Asked
from djinn_zmq.probe.rungs import connected, raw_call

PERSISTENT = "tcp, persistent connection"
FRESH = "tcp, connect and echo"
UNIX = "AF_UNIX, persistent connection"


@click.command(cls=command.Tool)
@command.measuring(samples=1000)
@click.option(
    "--nbytes",
    type=click.IntRange(1, 1 << 30),
    default=64,
    show_default=True,
    help="Bytes sent up in each call; an acknowledgement of 8 comes back.",
)
@click.option(
    "--echo",
    metavar="HOST:PORT",
    help="An echo that runs already, also on another machine (start one there with --serve). "
    "[default: an own process on the loopback]",
)
@click.option("--serve", is_flag=True, help="Be the echo: print HOST:PORT and serve until Ctrl-C.")
def tcp(asked: Asked, nbytes: int, echo: str | None, serve: bool) -> None:
    """The floor under everything: raw sockets, blocking calls, no library.

    \b
    persistent connection   send, and wait for the acknowledgement, on one connection
    connect and echo        the same on a new connection each time, as the prototype did
    AF_UNIX                 the persistent one without the network stack (own echo only)

    Whoever says that a request of theirs takes so and so long should subtract this first.

    \b
      python -m tools.tcp
      python -m tools.tcp --nbytes 10557440 --samples 100      # one activation of Llama-2-13B
      python -m tools.tcp --idle-ms 50                         # an interactive user
    """
    if serve:
        echoes.tcp()
    results = command.begin("tcp", asked, {"nbytes": nbytes, "echo": echo or "own"})
    data = memoryview(bytes(nbytes))
    with ExitStack() as stack:
        pids = []
        address = echo
        if address is None:
            address, pid = stack.enter_context(echoes.running("tcp"))
            pids.append(pid)
        try:
            persistent = stack.enter_context(connected(address))
        except (OSError, ValueError) as exc:
            raise click.ClickException(f"no echo answers at {address}: {exc}") from exc

        def fresh() -> None:
            with connected(address) as connection:
                raw_call(connection, data)()

        cases = {PERSISTENT: raw_call(persistent, data), FRESH: fresh}
        if echo is None:
            folder = stack.enter_context(serving.sockets_folder())
            path, pid = stack.enter_context(echoes.running("unix", f"{folder}/raw"))
            pids.append(pid)
            cases[UNIX] = raw_call(stack.enter_context(connected(path)), data)
        command.take(asked, cases, pids, results)
    command.show(f"{nbytes:,} bytes up", results)
    command.finish(asked, results)


if __name__ == "__main__":
    tcp(prog_name="python -m tools.tcp")
