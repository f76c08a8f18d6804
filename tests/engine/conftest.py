"""The engine's own conditions: one thread, inference mode; and no look at a hub."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from djinn_zmq.errors import Lost
from djinn_zmq.settings import KIB, Settings
from djinn_zmq.wire.messages import Granted


@pytest.fixture(scope="module", autouse=True)
def _as_in_the_engine() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    # At these sizes a second thread only waits, and where other work keeps its core busy, long.
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    torch.set_num_threads(threads)


@contextmanager
def keeping_with(limits: Settings) -> Iterator[Any]:
    """With a server that numbers arenas and has none of its own."""
    from djinn_zmq.bus.lease import LeaseSocket
    from djinn_zmq.engine.state.keeping import Keeping

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server, lease = LeaseSocket(ours), LeaseSocket(theirs)

    def number_arenas() -> None:
        number = 0
        try:
            while True:
                server.receive()
                number += 1
                server.send(Granted(number))
        except Lost:
            server.close()

    thread = threading.Thread(target=number_arenas)
    thread.start()
    keeping = Keeping(limits, lease, 0)
    yield keeping
    keeping.close()
    lease.close()
    thread.join()


@pytest.fixture
def keeping() -> Iterator[Any]:
    with keeping_with(Settings(host_memory=128 * KIB, arena=128 * KIB)) as one:
        yield one


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A `ServerSide`."""
    from tests.engine.keepers import ServerSide  # it needs torch, which need not be there

    with closing(ServerSide(tmp_path)) as answering:
        yield answering


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A disk tier's directory."""
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    return folder
