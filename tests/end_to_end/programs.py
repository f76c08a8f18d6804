"""Somebody's program, and somebody else's debugger beside it."""

import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import djinn_zmq as djinn

FRANCE = "the capital of france is"
WAIT_S = 20.0


class Program:
    """Somebody else's program: a connection of its own, asked from a thread of its own."""

    def __init__(self, server: djinn.Server, model: str = "tiny") -> None:
        self.server = server
        self.model = server.model(model)
        self._thread = ThreadPoolExecutor(1)

    def does(self, work, *args, **options) -> Future:
        return self._thread.submit(work, *args, **options)

    def runs(self, prompt: str = FRANCE, **options) -> Future:
        return self.does(self.model.run, prompt, **options)

    def close(self) -> None:
        self.server.close()
        self._thread.shutdown()


DEBUGGER = """
import sys, djinn_zmq as djinn
key = sys.argv[3] if len(sys.argv) > 3 else None
with djinn.connect(sys.argv[1], key=key) as server:
    attached = server.attach(int(sys.argv[2]), stop_at=2)
    print("attached", flush=True)
    print(attached.wait(), flush=True)
    sys.stdin.read()
"""


def debugger(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DEBUGGER, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=WAIT_S)
