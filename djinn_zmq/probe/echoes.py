"""What Djinn is compared with: the barest programs that carry the same bytes the same way.

Each runs in a process of its own, `python -m djinn_zmq.probe.echoes NAME ...`, says the endpoint it
is bound to on its first line, and is ended by its parent's SIGTERM, or with its parent.
"""

import ctypes
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import zmq

from djinn_zmq.wire import codec
from djinn_zmq.wire import messages as wire
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

PR_SET_PDEATHSIG = 1
HEAD = struct.Struct("<Q")  # how many bytes follow, of this call
ACK = b"received"
PREALLOCATED = 16 * 1024 * 1024  # bytes


# ---- the processes


def router(endpoint: str) -> None:
    """A bare ROUTER: one process, one socket, what comes goes back."""
    own = zmq.Context().socket(zmq.ROUTER)
    _bind(own, endpoint)
    while True:
        own.send_multipart(own.recv_multipart())


def front(endpoint: str, back_endpoint: str) -> None:
    """Passes on what comes over a ROUTER to the process behind a PAIR, and its answers back."""
    context = zmq.Context()
    bus, link = context.socket(zmq.ROUTER), context.socket(zmq.PAIR)
    link.bind(back_endpoint)
    _bind(bus, endpoint)
    poller = zmq.Poller()
    poller.register(bus, zmq.POLLIN)
    poller.register(link, zmq.POLLIN)
    while True:
        for ready, _ in poller.poll():
            (link if ready is bus else bus).send_multipart(ready.recv_multipart())


def back(endpoint: str) -> None:
    """The process behind `front`."""
    link = zmq.Context().socket(zmq.PAIR)
    link.connect(endpoint)
    _say(endpoint)
    while True:
        link.send_multipart(link.recv_multipart())


def tcp() -> None:
    """Raw TCP: whatever comes on a connection is received into memory that was there before, and
    acknowledged. Takes any number of connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    _say("{}:{}".format(*listener.getsockname()))
    _acknowledge(listener)


def unix(path: str) -> None:
    """The same over AF_UNIX, at *path*."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    _say(path)
    _acknowledge(listener)


def _acknowledge(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    memory = memoryview(bytearray(b"\1" * PREALLOCATED))  # touched: no page fault is measured
    with connection:
        while head := connection.recv(HEAD.size, socket.MSG_WAITALL):
            (nbytes,) = HEAD.unpack(head)
            if nbytes > len(memory):
                memory = memoryview(bytearray(b"\1" * nbytes))
            received = 0
            while received < nbytes:
                received += connection.recv_into(memory[received:nbytes])
            connection.sendall(ACK)


def pieces(endpoint: str) -> None:
    """A bare ROUTER that is sent messages of [how many bytes are still to come][data] and
    acknowledges the one behind which nothing comes."""
    own = zmq.Context().socket(zmq.ROUTER)
    _bind(own, endpoint)
    while True:
        route, head = own.recv(), own.recv()
        while own.getsockopt(zmq.RCVMORE):
            own.recv(copy=False)
        if HEAD.unpack_from(head) == (0,):
            own.send(route, zmq.SNDMORE)
            own.send(ACK)


def messages(endpoint: str) -> None:
    """The same with Djinn's messages: each is decoded, and an answer is made for what wants one:
    for an UPLOAD when its last CHUNK is there."""
    own = zmq.Context().socket(zmq.ROUTER)
    _bind(own, endpoint)
    awaited = 0
    while True:
        route, frame = own.recv(), own.recv()
        buffers = []
        while own.getsockopt(zmq.RCVMORE):
            buffers.append(own.recv(copy=False).buffer)
        message = codec.decode(frame, buffers)
        if message.header.op == Op.UPLOAD:
            awaited = message.meta.nbytes
        elif message.header.op == Op.CHUNK:
            awaited -= sum(map(len, buffers))
        if not awaited:
            own.send(route, zmq.SNDMORE)
            own.send(_pong(message.header))


def _pong(header: codec.Header) -> bytes:
    meta = wire.Pong("idle")
    return codec.encode(
        Op.PING, meta, flags=Flag.REPLY, request=header.request, session=header.session
    )


def tcp_echo() -> None:
    """A raw TCP echo of one connection, for messages that fit into one read."""
    listener = socket.create_server(("127.0.0.1", 0))
    _say("{}:{}".format(*listener.getsockname()))
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(4096):
        connection.sendall(data)


def doorbell(memory: str, bell: str, answer: str) -> None:
    """The barest lane: a word in shared memory and an eventfd each way; what stands in the first
    word, for how many nanoseconds to stay awake before, comes back in the ninth. Descriptors,
    inherited."""
    words = memoryview(mmap.mmap(int(memory), mmap.PAGESIZE)).cast("Q")
    _say("doorbell")
    while True:
        os.eventfd_read(int(bell))
        if words[0]:
            until_ns = time.perf_counter_ns() + words[0]
            while time.perf_counter_ns() < until_ns:
                pass
        words[8] = words[0]
        os.eventfd_write(int(answer), 1)


def _bind(own: zmq.Socket[bytes], endpoint: str) -> None:
    own.bind(endpoint)
    _say(own.getsockopt_string(zmq.LAST_ENDPOINT))


def _say(endpoint: str) -> None:
    print(endpoint, flush=True)


# ---- the parent's side


@contextmanager
def running(name: str, *arguments: str, fds: Sequence[int] = ()) -> Iterator[tuple[str, int]]:
    """One of the processes above; yields (its endpoint, its pid). fds: that it inherits."""
    process = subprocess.Popen(
        [sys.executable, "-m", "djinn_zmq.probe.echoes", name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        start_new_session=True,  # as Djinn's processes: the scheduler shares time by session
    )
    try:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        if not endpoint:
            raise RuntimeError(f"djinn_zmq.probe.echoes {name} ended with status {process.wait()}")
        yield endpoint, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def front_and_back(endpoint: str, back_endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """Both processes; yields (the endpoint in front, the two pids)."""
    with (
        running("front", endpoint, back_endpoint) as (bound, front_pid),
        running("back", back_endpoint) as (_, back_pid),
    ):
        yield bound, [front_pid, back_pid]


@contextmanager
def ringing() -> Iterator[tuple[Callable[..., None], int]]:
    """A call that takes one round trip to `doorbell` and back, and as many nanoseconds longer as it
    is given; and the pid."""
    fds = (os.memfd_create("doorbell"), os.eventfd(0), os.eventfd(0))
    memory, bell, answer = fds
    try:
        os.ftruncate(memory, mmap.PAGESIZE)
        words = memoryview(mmap.mmap(memory, mmap.PAGESIZE)).cast("Q")
        with running("doorbell", *map(str, fds), fds=fds) as (_, pid):

            def call(after_ns: int = 0) -> None:
                words[0] = after_ns
                os.eventfd_write(bell, 1)
                os.eventfd_read(answer)

            yield call, pid
    finally:
        for fd in fds:
            os.close(fd)


PROCESSES = {
    one.__name__: one
    for one in (router, front, back, tcp, unix, tcp_echo, doorbell, pieces, messages)
}

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    PROCESSES[sys.argv[1]](*sys.argv[2:])
