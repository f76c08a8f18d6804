"""The rungs of the ladder as calls that take turns; `ladder` says what they are and reads them."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from djinn_zmq.client.calls import PIECE, Call
from djinn_zmq.client.model import Model
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.server import Server
from djinn_zmq.probe import echoes
from djinn_zmq.probe.answering import answering
from djinn_zmq.probe.ladder import (
    ANSWER,
    BARE,
    BELL,
    BETWEEN,
    CODEC,
    ENGINE,
    LANE,
    LATE,
    PONG,
    RAW,
    RESUME,
    SERVER,
    ZMQ,
)
from djinn_zmq.probe.results import NotMeasured
from djinn_zmq.probe.rounds import Case, Task, told_clock
from djinn_zmq.spans import Spans
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op


@dataclass(slots=True)
class Ladder:
    """cases: rung → one call. pids: of the bare echoes. nbytes: that each rung carries up.

    spans: of every resume made so far. own_s: by rung, what this process spent itself in each call,
    apart from waiting for the answer. inside_s: what the engine had each no-op behind a resume for.
    """

    nbytes: int
    cases: dict[str, Case | Task] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    spans: list[Spans] = field(default_factory=list)
    own_s: dict[str, list[float]] = field(default_factory=dict)
    inside_s: list[float] = field(default_factory=list)


@contextmanager
def standing(
    server: Server,
    model: Model,
    point: Checkpoint,
    folder: Path,
    *,
    array: np.ndarray | None = None,
    ready: bool = False,
    lane: Model | None = None,
) -> Iterator[Ladder]:
    """All rungs up to resuming *point*, whose session is *model*'s or, where there is one, *lane*'s.

    array: replaces the checkpoint's hidden state, so that its bytes are carried up on every rung;
    None: only what a message needs. ready: stop at the checkpoint's own layer instead of going on
    to the logits. lane: the same model through a client that has the lane.
    """
    endpoint = server.connection.endpoint
    frame = _frame(point, model.session_id)
    ladder = Ladder(len(frame) if array is None else array.nbytes)
    with ExitStack() as stack:
        if _is_here(endpoint):
            _bare_rungs(ladder, stack, endpoint.startswith("ipc"), folder, frame, array)
        else:
            why = f"{endpoint} is another machine, and no bare echo runs there"
            ladder.not_measured += [NotMeasured(rung, why) for rung in BARE]
        ladder.cases[SERVER] = _no_op(model, array, 0)
        ladder.cases[ENGINE] = _no_op(model, array, model.session_id)
        if lane is not None:
            ladder.cases[LANE] = _no_op(lane, array, lane.session_id)
        else:
            ladder.not_measured.append(NotMeasured(LANE, "this client has no lane"))
        resumed = lane or model
        own_s = ladder.own_s = {BETWEEN: [], RESUME: []}
        behind = _behind(resuming(point, resumed, ready=True))
        no_op = _no_op(resumed, array, resumed.session_id, own_s[BETWEEN], ladder.inside_s)
        ladder.cases[BETWEEN] = Task(no_op, behind)
        answer, pong = stack.enter_context(
            answering(point, resumed, ready=ready, passed_on=lane is None)
        )
        ladder.cases[ANSWER] = Task(answer, behind, told_clock)
        ladder.cases[PONG] = Task(pong, behind, told_clock)
        ladder.cases[RESUME] = resuming(
            point, resumed, ladder.spans, own_s[RESUME], ready=ready, hidden=array
        )
        ring, pid = stack.enter_context(echoes.ringing())
        ladder.pids.append(pid)
        ladder.cases[LATE] = Task(_late(ring, ladder.spans), clock=told_clock)
        ladder.cases[BELL] = ring
        yield ladder


def _is_here(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return endpoint.startswith("ipc") or host in ("127.0.0.1", "localhost", "::1")


def _frame(point: Checkpoint, session: int) -> bytes:
    """What a resume without edits sends."""
    wanted = messages.Wanted(None, (), "last", 0)
    meta = messages.Resume(point.id, None, (), wanted)
    return codec.encode(Op.RESUME, meta, request=1 << 40, session=session)


def _bare_rungs(
    ladder: Ladder,
    stack: ExitStack,
    ipc: bool,
    folder: Path,
    frame: bytes,
    array: np.ndarray | None,
) -> None:
    def echo(name: str) -> str:
        arguments = [f"ipc://{folder}/{name}" if ipc else "tcp://127.0.0.1:*"]
        endpoint, pid = stack.enter_context(echoes.running(name, *arguments))
        ladder.pids.append(pid)
        return endpoint

    data = memoryview(frame if array is None else array.reshape(-1).view(np.uint8).data)
    if ipc:
        address, pid = stack.enter_context(echoes.running("unix", f"{folder}/raw"))
    else:
        address, pid = stack.enter_context(echoes.running("tcp"))
    ladder.pids.append(pid)
    ladder.cases[RAW] = raw_call(stack.enter_context(connected(address)), data)
    ladder.cases[ZMQ] = pieces_call(stack.enter_context(dealing(echo("pieces"))), data)
    dealer = stack.enter_context(dealing(echo("messages")))
    resume = codec.decode(frame)
    ladder.cases[CODEC] = (
        _message_call(dealer, resume) if array is None else _upload_call(dealer, data)
    )


def connected(address: str) -> socket.socket:
    """A connection to a raw echo: "HOST:PORT" or a path."""
    if address.startswith("/"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        return connection
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def raw_call(connection: socket.socket, data: memoryview) -> Case:
    """Send all of *data* and wait for the acknowledgement."""
    head = echoes.HEAD.pack(len(data))
    whole = head + data.tobytes() if len(data) < PIECE else None

    def call() -> None:
        if whole is not None:
            connection.sendall(whole)
        else:
            connection.sendall(head)
            connection.sendall(data)
        if connection.recv(64) != echoes.ACK:
            raise ConnectionError("the raw echo is gone")

    return call


@contextmanager
def dealing(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(endpoint)
    try:
        yield dealer
    finally:
        dealer.close()
        context.term()


def pieces_call(dealer: zmq.Socket[bytes], data: memoryview) -> Case:
    """As Djinn sends bulk: in messages of 1 MiB, without copying them."""
    if len(data) <= PIECE:
        one = echoes.HEAD.pack(0) + data[echoes.HEAD.size :].tobytes()

        def small() -> None:
            dealer.send(one)
            dealer.recv()

        return small
    ends = range(PIECE, len(data) + PIECE, PIECE)
    pieces = [(echoes.HEAD.pack(max(0, len(data) - end)), data[end - PIECE : end]) for end in ends]

    def call() -> None:
        for head, piece in pieces:
            dealer.send(head, zmq.SNDMORE)
            dealer.send(piece, copy=False)
        dealer.recv()

    return call


def _message_call(dealer: zmq.Socket[bytes], message: codec.Message) -> Case:
    header, meta = message.header, message.meta

    def call() -> None:
        frame = codec.encode(Op.RESUME, meta, request=header.request, session=header.session)
        dealer.send(frame)
        codec.decode(dealer.recv())

    return call


def _upload_call(dealer: zmq.Socket[bytes], data: memoryview) -> Case:
    def call() -> None:
        dealer.send(codec.encode(Op.UPLOAD, messages.Upload(len(data)), request=1))
        for offset in range(0, len(data), PIECE):
            meta = messages.Chunk(offset)
            dealer.send(
                codec.encode(Op.CHUNK, meta, flags=Flag.ONE_WAY, request=1, buffers=1), zmq.SNDMORE
            )
            dealer.send(data[offset : offset + PIECE], copy=False)
        codec.decode(dealer.recv())

    return call


def _no_op(
    model: Model,
    array: np.ndarray | None,
    session: int,
    own_s: list[float] | None = None,
    inside_s: list[float] | None = None,
) -> Case:
    """A ping, behind whatever brings *array* to where a resume would find it. session: 0: only to
    the server. own_s: gets what each took beside the waiting for its answer; inside_s: what the
    engine had it for."""

    def operation() -> Any:
        parcel = Parcel(model.connection, model.session_id)
        if array is not None:
            yield from parcel.place(array)
        asked = Call(Op.PING, messages.Ping(), session=session)
        reply = yield asked
        parcel.settle()
        return asked, reply.meta

    def call() -> None:
        begin_ns = time.perf_counter_ns()
        asked, pong = model.drive(operation())
        if own_s is not None:
            elapsed_ns = time.perf_counter_ns() - begin_ns
            own_s.append((elapsed_ns - (asked.arrived_ns - asked.sent_ns)) / 1e9)
        if inside_s is not None:
            inside_s.append(pong.inside_ns / 1e9)

    return call


def _late(ring: Callable[[int], None], spans: Sequence[Spans]) -> Callable[[], float]:
    """A bare doorbell that is answered after as long as an engine takes, less that. For `told_clock`.
    spans: of the resumes so far."""

    def call() -> float:
        inside_ns = sum(ns for _, ns in spans[-1][2:-1])
        begin_ns = time.perf_counter_ns()
        ring(inside_ns)
        return (time.perf_counter_ns() - begin_ns - inside_ns) / 1e9

    return call


def _behind(resume: Task) -> Case:
    """What has gone before where a resume is called: another one, and its release."""
    assert resume.before is not None
    release = resume.before

    def go_before() -> None:
        resume.call()
        release()

    return go_before


def resuming(
    point: Checkpoint,
    model: Model,
    spans: list[Spans] | None = None,
    own_s: list[float] | None = None,
    *,
    ready: bool = False,
    rewrite: Case | None = None,
    **options: Any,
) -> Task:
    """Resuming *point*, whose session is *model*'s. spans: gets each run's. own_s: what each took
    beside the waiting for its answer. rewrite: called, and timed, in front of each.
    The call says itself how long it took: for `told_clock`.

    ready: stop at the checkpoint's own layer, when layer N+1 could run. That keeps another
    checkpoint each time; the one before is released, and the release done, before the clock starts.
    """
    if ready:
        options |= {"stop_at": point.layer, "logits": "none"}
    held: list[Run] = []

    def call() -> float:
        begin_ns = time.perf_counter_ns()
        if rewrite is not None:
            rewrite()
        asked_ns = time.perf_counter_ns()
        run = point.resume(**options)
        end_ns = time.perf_counter_ns()
        if ready:
            held.append(run)
        told = run.spans  # made when they are looked at: not on the clock
        if spans is not None:
            spans.append(told)
        if own_s is not None:
            own_s.append((end_ns - asked_ns - sum(ns for _, ns in told[1:-1])) / 1e9)
        return (end_ns - begin_ns) / 1e9

    def release() -> None:
        held.clear()
        model.ping()  # what is to be released goes ahead of the next request

    return Task(call, release if ready else None, told_clock)
