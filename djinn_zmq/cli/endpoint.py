"""The options every command that talks to a server has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--server and --key, for `djinn_zmq.connect`."""
    command = click.option(
        "--key",
        type=click.Path(path_type=Path),
        help="Your key file, for a server on another machine; server.pub must lie beside it.",
    )(command)
    return click.option(
        "--server",
        "endpoint",
        metavar="ENDPOINT",
        help="ipc://PATH or tcp://HOST:PORT. [default: $DJINN_ENDPOINT, else your own server]",
    )(command)
