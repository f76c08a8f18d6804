"""A Djinn server of a measurement's own, over ipc and tcp, with the embedded model loaded."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import djinn_zmq as djinn
from djinn_zmq.client.local import private_server

MODEL = "tiny"


@dataclass(frozen=True, slots=True)
class Served:
    """ipc, tcp: endpoints. pids: the server's, then its engines'."""

    ipc: str
    tcp: str
    pids: tuple[int, ...]


@contextmanager
def own_server(folder: Path) -> Iterator[Served]:
    """Started, ready, and gone with the block. folder: where its socket goes."""
    port = _free_port()
    with private_server(folder, "cpu", "auto", f"--port={port}", f"--model={MODEL}") as ipc:
        with djinn.connect(ipc, progress=None) as server:
            server.model(MODEL).ping()  # waits until the model is loaded
            status = server.status()
        pids = (status.pid, *(engine.pid for engine in status.engines))
        yield Served(ipc, f"tcp://127.0.0.1:{port}", pids)


@contextmanager
def sockets_folder() -> Iterator[Path]:
    """A directory of mode 0700 with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="djinn-bench-", dir="/tmp") as name:
        yield Path(name)


def _free_port() -> int:
    """Free now; a server that finds it taken says so and the bench ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
