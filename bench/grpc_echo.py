"""gRPC in Python, as fast as it goes without generated code: bytes in, the same bytes out.

`python -m bench.grpc_echo sync|aio` is a server in a process of its own; it says its port.
"""

import asyncio
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

PR_SET_PDEATHSIG = 1
SERVICE, METHOD = "djinn.Echo", "Echo"
WORKERS = 8  # threads of the sync server; more share one GIL and only wait for it
KINDS = ("sync", "aio")


def _echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


async def _echo_aio(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return request


def _methods(echo: object) -> grpc.GenericRpcHandler:
    rpc = grpc.unary_unary_rpc_method_handler(echo)  # no serializers: bytes are bytes
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: rpc})


def serve_sync() -> None:
    server = grpc.server(ThreadPoolExecutor(WORKERS), handlers=[_methods(_echo)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


async def serve_aio() -> None:
    server = grpc.aio.server(handlers=[_methods(_echo_aio)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def running(kind: str) -> Iterator[tuple[str, int]]:
    """A server process of *kind*; yields (its address, its pid)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.grpc_echo", kind],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as Djinn's processes: the scheduler shares time by session
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"bench.grpc_echo {kind} ended with status {process.wait()}")
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.argv[1] == "sync":
        serve_sync()
    else:
        asyncio.run(serve_aio())
