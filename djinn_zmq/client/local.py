"""A private server for one program: started with a `with` block, gone with it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from djinn_zmq.client import checks
from djinn_zmq.client.model import Model
from djinn_zmq.client.server import connect
from djinn_zmq.errors import RequestError, StartError, Unreachable
from djinn_zmq.settings import runtime_dir
from djinn_zmq.wire.messages import Progress

DTYPES = ("auto", "float32", "bfloat16", "float16")
START_S = 30.0
STOP_S = 10.0
MOST_THREADS = 1024  # as `djinn serve --threads`


@contextmanager
def local(
    model: str | os.PathLike[str],
    device: str = "cpu",
    *,
    dtype: str = "auto",
    threads: int | None = None,
    progress: Callable[[Progress], None] | None | bool = True,
) -> Iterator[Model]:
    """Serve *model* in a private server and give it, as `Server.model` does.

    device: "cpu" or "cuda:N"; on a machine without a GPU it is the CPU (`model.device` says which).
    threads: of its engine on the CPU; None: torch's choice, a thread a core. A small model is faster with 1, and
    much so where other work keeps the cores busy.
    The server is this program's own (its socket has a random name in your runtime directory) and ends
    with the block, whatever happens in it; `model.server` is it.
    Raises StartError with the server's last words where it does not come up.
    """
    check(model, device, dtype)
    more = threads_of(threads)
    folder = Path(tempfile.mkdtemp(prefix="local-", dir=runtime_dir()))
    try:
        with (
            private_server(folder, device, dtype, *more) as endpoint,
            connect(endpoint, progress=progress) as server,
        ):
            yield server.model(os.fspath(model))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check(model: Any, device: Any, dtype: Any) -> None:
    """Before a server is started for it. Raises RequestError."""
    checks.model("model", model)
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda:\d+", device):
        raise RequestError(f'device={checks.shown(device)}: "cpu" or "cuda:N"')
    checks.one_of("dtype", dtype, DTYPES)


def threads_of(threads: Any) -> tuple[str, ...]:
    """As options of the server. Raises RequestError."""
    if threads is None:
        return ()
    return (f"--threads={checks.whole('threads', threads, least=1, most=MOST_THREADS)}",)


@contextmanager
def private_server(folder: Path, device: str, dtype: str = "auto", *more: str) -> Iterator[str]:
    """A server process with its socket in *folder*; yields its endpoint. more: its options.

    The server removes *folder* when it ends, if nothing else is in it.
    """
    path = folder / "djinn.sock"
    place = ["--device=cpu"] if device == "cpu" else [f"--gpu={device.removeprefix('cuda:')}"]
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "djinn_zmq.server",
                "--port=0",
                f"--ipc={path}",
                f"--dtype={dtype}",
                "--private",
                *place,
                *more,
            ],
            stdin=subprocess.PIPE,  # its end tells the server that this program was killed
            stdout=words,
            stderr=words,
            start_new_session=True,  # Ctrl-C is this program's; the block's end stops the server
        )
        try:
            _wait_for(path, process, words.fileno())
            yield f"ipc://{path}"
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(path: Path, process: subprocess.Popen[bytes], words: int) -> None:
    limit = time.monotonic() + START_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            os.lseek(words, 0, os.SEEK_SET)
            said = os.read(words, 1 << 16).decode(errors="replace").strip()
            raise StartError(f"the server ended with status {process.returncode}: {said[-2000:]}")
        try:
            connect(f"ipc://{path}", timeout_s=1.0).close()
            return
        except Unreachable:
            time.sleep(0.02)
    raise StartError(f"the server did not answer within {START_S:g} s")
