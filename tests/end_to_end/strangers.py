"""Whom a server does not know: requests by hand, and programs that are paused and killed."""

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.keys import client_keys
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

FRANCE = "the capital of france is"
WAIT_S = 30.0


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


class Raw:
    """Frames of the protocol by hand, for what the client library would never send."""

    def __init__(self, endpoint: str, key: Path | None = None) -> None:
        self._dealer = Dealer(endpoint, Settings(), client_keys(key, None) if key else None)
        self._dealer.socket.rcvtimeo = int(WAIT_S * 1000)
        self._numbers = itertools.count(1)

    def ask(self, op: Op, meta, session: int = 0, **options):
        """The reply's meta. Raises what the server refused with."""
        number = next(self._numbers)
        self._dealer.send(codec.encode(op, meta, request=number, session=session, **options))
        while True:
            frames = self._dealer.receive(wait=True)
            assert frames is not None, f"no answer to {op!r}"
            message = codec.decode(*frames)
            if message.header.request != number or message.header.flags & Flag.PROGRESS:
                continue  # the server's knock
            if message.header.flags & Flag.ERROR:
                raise codec.error_of(message)
            return message.meta

    def close(self) -> None:
        self._dealer.close()


@contextlib.contextmanager
def relay(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """(an endpoint that leads to the tcp *endpoint*, what has the next answer cut off where it is set)."""
    host, port = endpoint.removeprefix("tcp://").split(":")
    server = host, int(port)
    ends: list[socket.socket] = []
    cuts = threading.Event()

    def cut() -> None:
        for end in ends:
            with contextlib.suppress(OSError):  # it has ended already
                end.shutdown(socket.SHUT_RDWR)

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut
            while data := source.recv(1 << 16):
                if cuts.is_set() and source.getpeername() == server:
                    cuts.clear()
                    cut()
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def take(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, far = listening.accept()[0], socket.create_connection(server)
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=pass_on, args=pair))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads = [threading.Thread(target=take, args=(listening,))]
        threads[0].start()
        try:
            yield f"tcp://127.0.0.1:{listening.getsockname()[1]}", cuts
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            threads[0].join()
            cut()
            for thread in threads[1:]:
                thread.join()
            for end in ends:
                end.close()


def every_way_into(session: int, number: int):
    """One request of every kind that names a session, and a checkpoint where it does."""
    wanted = messages.Wanted(None, (), "last", 0)
    return [
        (Op.PING, messages.Ping()),
        (Op.RUN, messages.Run((FRANCE,), None, wanted)),
        (Op.RESUME, messages.Resume(number, None, (), wanted)),
        (Op.READ, messages.Read(number, (), 0, 64)),
        (Op.RELEASE, messages.Release((number,))),
        (Op.CANCEL, messages.Cancel(1)),
        (Op.TOKENS, messages.Tokens(FRANCE, None)),
        (Op.UPLOAD, messages.Upload(4096)),
        (Op.CLOSE, messages.Close()),
    ]


PAUSED = """
import os, sys, djinn_zmq as djinn
endpoint, key = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
model = djinn.connect(endpoint, key=key).model("tiny")
point = model.run("the capital of france is", stop_at=2).checkpoint
print(model.session_id, point.id, flush=True)
os.read(0, 1)
"""


@contextlib.contextmanager
def paused(endpoint: str, *key: Path):
    """Another process, stopped at a checkpoint: (process, session, checkpoint)."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, endpoint, *map(str, key)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            session, number = map(int, process.stdout.readline().split())
            yield process, session, number
        finally:
            process.kill()


def sessions_of(server) -> dict[int, messages.SessionInfo]:
    return {one.id: one for one in server.sessions()}
