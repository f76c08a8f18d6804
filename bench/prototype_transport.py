"""Baseline: the prototype's transport, written afresh: asyncio, a new connection for each call,
length-prefixed, the activation pickled or as raw bytes. `python -m bench.prototype_transport`.

Both ends are processes of their own, because most of the time is page faults: each receive allocates
10 MB that glibc gives back to the kernel at once. "memory kept" is the same program with glibc told
not to (MALLOC_* in its environment); whoever claims "N times the prototype" shows both.
"""

import asyncio
import ctypes
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from bench.cases import INDEPENDENT, Found, Timed
from bench.config import only
from djinn_zmq.probe.rounds import told_clock

NAME = "prototype"
FORMATS = ("pickle", "binary")
AS_IT_COMES, KEPT = "as it comes", "memory kept"
KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
LENGTH = struct.Struct("<Q")
LIMIT = 1 << 26  # bytes asyncio buffers of one stream
PR_SET_PDEATHSIG = 1


# ---- the two processes


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(LENGTH.pack(len(data)))
    writer.write(data)
    await writer.drain()


def _pack(form: str, array: np.ndarray) -> bytes:
    if form == "pickle":
        return pickle.dumps({"layer": 20, "hidden": array})
    return array.tobytes()


def _unpack(form: str, data: bytes) -> np.ndarray:
    """A pickle is only ever read here, from our own child: this is what Djinn does without."""
    if form == "pickle":
        hidden: np.ndarray = pickle.loads(data)["hidden"]
        return hidden
    return np.frombuffer(data, np.uint8).copy()  # its own: it is to be edited


async def serve(form: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _unpack(form, await _read(reader))
        await _send(writer, b"received")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=LIMIT)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


async def _call(form: str, port: int, array: np.ndarray) -> float:
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT)
    await _send(writer, _pack(form, array))
    await _read(reader)
    writer.close()
    await writer.wait_closed()
    return time.perf_counter() - begin


def ask(form: str, port: int, nbytes: int) -> None:
    """A call for every line on standard input; its seconds on standard output."""
    array = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)
    with asyncio.Runner() as runner:
        for _ in sys.stdin:
            print(runner.run(_call(form, port, array)), flush=True)


# ---- the parent's side


@contextmanager
def _child(*arguments: str, keep: bool) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.prototype_transport", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(KEEPING if keep else {})},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def cases(nbytes: int) -> Iterator[tuple[Found, list[int], list[int]]]:
    """Bringing *nbytes* to the server, for each format and with memory kept or not; the pids of the
    clients and of the servers."""
    found: Found = []
    clients, servers = [], []
    with ExitStack() as stack:
        for form in FORMATS:
            for keep in (False, True):
                server = stack.enter_context(_child("serve", form, keep=keep))
                assert server.stdout is not None
                port = server.stdout.readline().strip()
                client = stack.enter_context(_child("ask", form, port, str(nbytes), keep=keep))
                variant = f"{form}, {KEPT if keep else AS_IT_COMES}"
                found.append(Timed(NAME, variant, INDEPENDENT, _caller(client), clock=told_clock))
                clients.append(client.pid)
                servers.append(server.pid)
        yield found, clients, servers


def _caller(client: subprocess.Popen[str]):  # type: ignore[no-untyped-def]
    def call() -> float:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write("\n")
        client.stdin.flush()
        said = client.stdout.readline()
        if not said:
            raise ConnectionError("the prototype's client ended")
        return float(said)

    return call


def _process() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2]))
    else:
        ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))


if __name__ == "__main__":
    if sys.argv[1:2] in (["serve"], ["ask"]):
        _process()
    else:
        only(NAME)
