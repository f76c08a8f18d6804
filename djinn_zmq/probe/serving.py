"""A Djinn server of a measurement's own, over ipc and tcp, with its model loaded."""

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import djinn_zmq as djinn
from djinn_zmq.client.local import private_server

MODEL = "tiny"


@dataclass(frozen=True, slots=True)
class Served:
    """ipc, tcp: endpoints. model: the name it
    is served by. pids: the server's, then its engines'."""

    ipc: str
    tcp: str
    pids: tuple[int, ...]
    model: str = MODEL


@contextmanager
def begun(
    folder: Path,
    *more: str,
    model: str = MODEL,
    shape: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> Iterator[Callable[[], Served]]:
    """Started, and gone with the block; what it gives waits until the model is loaded, so that several
    can load at once. folder: where its socket goes. shape: serve random weights of this shape in place
    of *model*. more: options of the server."""
    port = free_port()
    weights = f"--random-weights={shape}" if shape else f"--model={model}"
    with private_server(folder, device, dtype, f"--port={port}", weights, *more) as ipc:

        def ready() -> Served:
            with djinn.connect(ipc, progress=None) as server:
                name = shape or model
                server.model(name).ping()  # waits until the model is loaded
                status = server.status()
            pids = (status.pid, *(engine.pid for engine in status.engines))
            return Served(ipc, f"tcp://127.0.0.1:{port}", pids, name)

        yield ready


@contextmanager
def own_server(folder: Path, *more: str, **options: Any) -> Iterator[Served]:
    """The same, ready. options: as of `begun`."""
    with begun(folder, *more, **options) as ready:
        yield ready()


@contextmanager
def sockets_folder() -> Iterator[Path]:
    """A directory of mode 0700 with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="djinn-bench-", dir="/tmp") as name:
        yield Path(name)


def free_port() -> int:
    """Free now; a server that finds it taken says so and the measurement ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
