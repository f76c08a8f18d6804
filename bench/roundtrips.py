"""The no-op, one at a time: through Djinn's client, server and engine, and bare."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import zmq

import djinn_zmq as djinn
from djinn_zmq.probe import echoes
from djinn_zmq.probe.serving import MODEL, Served
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.ops import Op

Call = Callable[[], object]
TRANSPORTS = ("ipc", "tcp")

DJINN = "{}: djinn, through server and engine"
PING = "{}: djinn, to the server only"
FRONT = "{}: bare ROUTER front and PAIR"
ROUTER = "{}: bare ROUTER"
RAW = "tcp: raw socket"
LANE = "lane: djinn, client to engine"
DOORBELL = "lane: bare doorbell"


def noop_frame(session: int) -> bytes:
    """The request frame of `Model.ping`: what the bare echoes carry too."""
    return codec.encode(Op.PING, messages.Ping(), request=1 << 40, session=session)


@contextmanager
def cases(served: Served, folder: Path) -> Iterator[tuple[dict[str, Call], list[int]]]:
    """Every case as a call that takes one round trip; and the pids of the bare servers."""
    calls: dict[str, Call] = {}
    pids: list[int] = []
    with ExitStack() as stack:
        for transport in TRANSPORTS:
            endpoint = served.ipc if transport == "ipc" else served.tcp
            server = stack.enter_context(djinn.connect(endpoint, progress=None, lane=False))
            model = server.model(MODEL)
            frame = noop_frame(model.session_id)
            calls[DJINN.format(transport)] = model.ping
            calls[PING.format(transport)] = server.ping

            bound, both = stack.enter_context(
                echoes.front_and_back(_endpoint(transport, folder, "front"), _ipc(folder, "back"))
            )
            pids += both
            calls[FRONT.format(transport)] = stack.enter_context(zmq_call(bound, frame))

            bound, pid = stack.enter_context(
                echoes.running("router", _endpoint(transport, folder, "router"))
            )
            pids.append(pid)
            calls[ROUTER.format(transport)] = stack.enter_context(zmq_call(bound, frame))
        server = stack.enter_context(djinn.connect(served.ipc, progress=None))
        calls[LANE] = server.model(MODEL).ping
        calls[DOORBELL], pid = stack.enter_context(echoes.ringing())
        pids.append(pid)
        address, pid = stack.enter_context(echoes.running("tcp_echo"))
        pids.append(pid)
        calls[RAW] = stack.enter_context(_raw_call(address, frame))
        yield calls, pids


def _ipc(folder: Path, name: str) -> str:
    return f"ipc://{folder}/{name}-{len(list(folder.iterdir()))}"


def _endpoint(transport: str, folder: Path, name: str) -> str:
    return "tcp://127.0.0.1:*" if transport == "tcp" else _ipc(folder, name)


@contextmanager
def zmq_call(endpoint: str, frame: bytes) -> Iterator[Call]:
    """A round trip of *frame* to what is bound to *endpoint*."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(endpoint)

    def call() -> None:
        dealer.send(frame)
        dealer.recv()

    try:
        yield call
    finally:
        dealer.close()
        context.term()


@contextmanager
def _raw_call(address: str, frame: bytes) -> Iterator[Call]:
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def call() -> None:
            connection.sendall(frame)
            connection.recv(4096)

        yield call
