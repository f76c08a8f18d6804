"""`djinn stop`: end your server."""

import contextlib
import os
import select

import click

from djinn_zmq.client.server import connect
from djinn_zmq.errors import Lost, RequestError, RunError
from djinn_zmq.settings import default_endpoint

WAIT_S = 10.0


@click.command()
@click.option(
    "--server",
    "endpoint",
    metavar="ipc://PATH",
    help="Which server. [default: $DJINN_ENDPOINT, else your own]",
)
def stop(endpoint: str | None) -> None:
    """Stop your server: running requests are refused, engines end, sockets are removed. With --state,
    checkpoints that are not there yet are written before.

    Only over its ipc socket, and only for the user who runs it.
    """
    endpoint = default_endpoint() if endpoint is None else endpoint
    if not endpoint.startswith("ipc://"):
        raise RequestError(
            f"cannot stop {endpoint}: a server is stopped over its ipc socket, by 'djinn stop' on its "
            "own machine"
        )
    server = connect(endpoint)
    try:
        pid = server.status().pid
        within_s = 0.0
        with contextlib.suppress(Lost):  # it may be gone before its answer has left
            within_s = server.stop()
    finally:
        server.close()
    _wait_for_end(pid, WAIT_S + within_s)
    click.echo(f"stopped the server with pid {pid}")


def _wait_for_end(pid: int, wait_s: float) -> None:
    """Until the process is gone. Raises RunError where it is still there after *wait_s*."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(wait_s * 1000):
            raise RunError(f"the server (pid {pid}) has not ended after {wait_s:.0f} s")
    finally:
        os.close(handle)
