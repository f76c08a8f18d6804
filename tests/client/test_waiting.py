"""What is left of a request whose client stops waiting for it."""

import asyncio
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.client import run as run_room
from djinn_zmq.client.calls import LOOK_S, PIECE, Call, Operation, T
from djinn_zmq.client.connection import WINDOW, Connection
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.run import ask
from djinn_zmq.client.session import Session
from djinn_zmq.client.waiting import WaitingConnection
from djinn_zmq.errors import Busy, Lost, PromptError
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from tests.client import test_parts
from tests.client.test_leftovers import kept, ran
from tests.client.test_parts import OPENED, Script, parts_on

script = test_parts.script


class Slow(Script):
    """Sends word of its progress with a TOKENS request, and the answer when that is cancelled; and opens
    sessions only behind the next ping."""

    closed: list[int]
    opening: tuple[bytes, codec.Header] | None = None

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.TOKENS:
            said = messages.Progress("slowly", 1, 2)
            frame = codec.encode(Op.TOKENS, said, flags=Flag.PROGRESS, request=header.request)
            self._router.send(route, frame)
        elif header.op == Op.OPEN:
            self.opening = route, header
        elif header.op == Op.CLOSE:
            self.closed.append(header.session)
        else:
            if header.op == Op.PING and self.opening is not None:
                self._reply(*self.opening, OPENED)
                self.opening = None
            super()._take(route, header, meta)


def full(*_: object) -> None:
    raise Busy("the way is full")


@pytest.fixture
def slow(script: Script) -> Iterator[Slow]:
    script.__class__ = Slow
    script.closed = []  # type: ignore[attr-defined]
    yield script  # type: ignore[misc]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in progress")])
def test_who_stops_waiting_cancels_and_takes_back_what_travelled_with_it_at_once(
    slow: Slow, error: BaseException
) -> None:
    ended = []

    def progress(_: messages.Progress) -> None:
        raise error

    def operation() -> Operation[None]:
        try:
            yield Call(Op.TOKENS, messages.Tokens("", None), session=7, progress=progress)
        finally:
            ended.append(True)

    with djinn.connect(slow.endpoint) as server:
        with pytest.raises(type(error)) as raised:
            server.drive(operation())
        assert ended and raised.value is error  # though an interpreter still has the error
        assert not server.connection._calls
        assert server.ping() == "scripted"
        assert len(slow.cancelled) == 1


class Dropping(Script):
    """Says to who has asked for *left* statuses, once, that it has dropped him; answers all else."""

    left = 1

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.STATUS:
            self.left -= 1
            if not self.left:
                self._router.send(route, codec.failure(codec.NOBODYS, Lost("dropped")))
        super()._take(route, header, meta)


def test_who_is_told_that_all_he_asked_for_is_lost_waits_for_none_of_it(script: Script) -> None:
    script.__class__ = Dropping
    with djinn.connect(script.endpoint) as server:
        with pytest.raises(Lost, match="dropped"):
            server.status()
        assert not server.connection._calls and server.ping() == "scripted"

    async def main() -> None:
        script.left = 3  # type: ignore[attr-defined]
        async with aio.connect(script.endpoint) as server:
            asked = await asyncio.gather(
                *(server.status() for _ in range(3)), return_exceptions=True
            )
            assert [str(error) for error in asked] == ["dropped"] * 3
            assert await server.ping() == "scripted"

    asyncio.run(main())


def test_who_shared_memory_with_a_server_that_is_gone_asks_nothing_of_who_serves_in_its_place(
    script: Script,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with djinn.connect(script.endpoint) as server:
        server.connection.sharing.lease = LeaseSocket(ours)
        assert server.ping() == "scripted"
        theirs.close()
        for ask in (server.ping, server.status, server.ping, server.stop):
            with pytest.raises(Lost, match="is gone: once it is back, connect again"):
                ask()


def test_a_session_that_is_opened_when_nobody_waits_for_it_any_more_is_closed(slow: Slow) -> None:
    async def main() -> None:
        async with aio.connect(slow.endpoint) as server:
            opening = asyncio.create_task(server.model("it"))
            while slow.opening is None:
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            for _ in range(3):  # the first brings it, the next says that nobody has it
                await server.ping()
            assert slow.closed == [OPENED.session]

    asyncio.run(main())


@pytest.mark.parametrize("script", [(1, "silence")], indirect=True)
def test_who_cancels_a_wait_for_a_part_gets_no_other_error(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            parts = parts_on(server)
            assert await anext(parts) == 0
            waiting = asyncio.ensure_future(anext(parts))
            await asyncio.sleep(0)
            with monkeypatch.context() as patch:
                patch.setattr(Connection, "_send", full)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            await parts.close()
            await server.ping()
            assert len(set(script.cancelled)) == 1

    asyncio.run(main())


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """What was released because nobody took it."""
    found: list[Message] = []
    monkeypatch.setattr(Connection, "give_back", lambda _, message: found.append(message))
    return found


@pytest.mark.parametrize("script", [(3, "reply")], indirect=True)
def test_an_answer_that_has_come_when_it_is_given_up_is_given_back(
    script: Script, given_back: list[Message]
) -> None:
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        assert next(parts) == 0
        call = server.connection._calls[parts._request]
        while call.reply is None:  # it comes while another is waited for
            server.ping()
        parts.close()
        assert len(given_back) == 3 and given_back[-1] is call.reply


@pytest.mark.parametrize("script", [(0, "reply")], indirect=True)
def test_what_is_taken_in_asyncio_code_is_not_given_back(
    script: Script, given_back: list[Message]
) -> None:
    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            assert await server.ping() == "scripted"
            assert [part async for part in parts_on(server)] == []
            assert not server.connection._calls

    asyncio.run(main())
    assert not given_back


@pytest.mark.parametrize("script", [(0, "silence")], indirect=True)
@pytest.mark.parametrize("in_parts", [False, True])
def test_who_interrupts_a_wait_gets_no_other_error(
    script: Script, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    ended = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def operation() -> Operation[None]:
        try:
            yield Call(Op.TOKENS, messages.Tokens("", None), session=7)
        finally:
            ended.append(True)

    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        with monkeypatch.context() as patch:
            patch.setattr(server.connection, "_hear", interrupt)
            patch.setattr(Connection, "cancel", full)
            with pytest.raises(KeyboardInterrupt):
                next(parts) if in_parts else server.drive(operation())
        assert ended or in_parts
        parts.close()
        assert not server.connection._calls and server.ping() == "scripted"


@pytest.mark.parametrize("script", [(0, "silence")], indirect=True)
def test_parts_that_were_waited_for_when_the_callers_own_function_failed_are_cancelled(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("in progress")

    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        with monkeypatch.context() as patch:
            patch.setattr(server.connection, "_hear", fail)
            with pytest.raises(ValueError, match="in progress"):
                next(parts)
        assert not server.connection._calls
        server.ping()
        assert len(script.cancelled) == 1


@pytest.mark.parametrize("script", [(1, "silence")], indirect=True)
def test_a_task_that_is_cancelled_cancels_all_that_it_has_asked_together(script: Script) -> None:
    def operation() -> Operation[None]:
        yield [Call(Op.TOKENS, messages.Tokens("", None), session=7) for _ in range(3)]

    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            asking = asyncio.ensure_future(server.drive(operation()))
            while len(server.connection._calls) < 3:
                await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await server.ping()
            assert len(set(script.cancelled)) == 3 and not server.connection._calls

    asyncio.run(main())


def test_a_client_gives_up_when_its_time_has_passed_since_it_asked_however_often_it_looked() -> (
    None
):
    call = Call(Op.TOKENS, messages.Tokens("", None), timeout_s=100.0)
    call.sent_ns = time.perf_counter_ns()
    limit_s = call.waits_until()
    assert not call.late(limit_s)
    call.sent_ns -= 50 * 10**9
    assert call.waits_until() == pytest.approx(limit_s - 50.0) and not call.late(call.waits_until())
    call.sent_ns -= 60 * 10**9  # for the second part of its answer, say
    assert call.late(call.waits_until())
    call.held_s = 60.0  # by a debugger: that does not count
    assert not call.late(call.waits_until())


def test_more_is_waited_than_was_told_only_for_an_engine_that_is_to_say_that_it_gave_up() -> None:
    for op, meta in (
        (Op.HELLO, messages.Hello("", 1)),
        (Op.STATUS, messages.Status()),
        (Op.CLOSE, messages.Close()),
    ):
        assert Call(op, meta, timeout_s=0.5).waits_until() == 0.5
    tokens = Call(Op.TOKENS, messages.Tokens("", None), timeout_s=0.5)
    assert tokens.waits_until() == 0.5 + 2 * LOOK_S


class Keeping(Script):
    """Keeps what comes of uploads as the server does, and answers none."""

    offsets: list[int]

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.CHUNK:
            self.offsets.append(meta.offset)  # type: ignore[attr-defined]
        super()._take(route, header, meta)


def test_an_upload_that_is_interrupted_is_broken_off(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a piece that cannot be: the server drops what has come."""
    script.__class__ = Keeping
    script.offsets = []  # type: ignore[attr-defined]
    data = memoryview(bytes(3 * PIECE))

    def operation() -> Operation[None]:
        yield Call(Op.UPLOAD, messages.Upload(len(data)), session=7, data=data)

    with djinn.connect(script.endpoint) as server:
        send, sent = server.connection._dealer.send, []

        def interrupted(*args: object) -> None:
            send(*args)
            sent.append(args)
            if len(sent) == 3:  # the request and two pieces
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(server.connection._dealer, "send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                server.drive(operation())
        assert server.ping() == "scripted"
        assert script.offsets == [0, PIECE, len(data)]  # type: ignore[attr-defined]


def test_the_time_for_which_a_debugger_holds_a_request_does_not_count() -> None:
    call = Call(Op.TOKENS, messages.Tokens("", None), timeout_s=10.0)
    call.sent_ns = time.perf_counter_ns() - 60 * 10**9
    call.hold(True)
    assert not call.late(call.waits_until())
    assert call.held_since is not None
    call.held_since -= 55.0
    call.hold(True)  # said once more: it is held on
    assert call.held_s >= 55.0 and not call.late(call.waits_until())
    call.hold(False)
    assert 55.0 <= call.held_s < 60.0 and not call.late(call.waits_until())
    call.hold(False)
    call.sent_ns -= 20 * 10**9
    assert call.held_s < 60.0 and call.late(call.waits_until())


class Together(Script):
    """Answers requests when as many as may be on their way are there, or all *total*: the last one first."""

    held: list[tuple[bytes, codec.Header]]
    seen = most = 0
    refused = -1  # the place of one that is

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op != Op.TOKENS:
            super()._take(route, header, meta)
            return
        self.held.append((route, header))
        self.seen += 1
        self.most = max(self.most, len(self.held))
        if len(self.held) < WINDOW and self.seen < self.total:
            return
        first = self.seen - len(self.held)
        for place in reversed(range(len(self.held))):
            route, header = self.held[place]
            if first + place == self.refused:
                self._router.send(route, codec.failure(header, PromptError("too long")))
            else:
                self._reply(
                    route,
                    msgspec.structs.replace(header, op=int(Op.CANCEL)),
                    messages.Cancelled(True),
                )
        self.held.clear()


@pytest.fixture
def together(script: Script) -> Iterator[Together]:
    script.__class__ = Together
    script.held, script.total = [], 20  # type: ignore[attr-defined]
    yield script  # type: ignore[misc]


def asked_together(endpoint: str, operation: Operation[T], *, awaited: bool) -> T:
    """What *operation* comes to, on a connection that has nothing under way then."""

    async def main() -> T:
        async with aio.connect(endpoint) as server:
            try:
                return await server.drive(operation)
            finally:
                assert not server.connection._calls

    if awaited:
        return asyncio.run(main())
    with djinn.connect(endpoint) as server:
        try:
            return server.drive(operation)
        finally:
            assert not server.connection._calls


def twenty() -> Operation[list[Message]]:
    return (yield [Call(Op.TOKENS, messages.Tokens("", None), session=7) for _ in range(20)])


@pytest.mark.parametrize("awaited", [False, True])
def test_of_many_requests_only_some_are_on_their_way_and_their_answers_are_in_order(
    together: Together, awaited: bool
) -> None:
    replies = asked_together(together.endpoint, twenty(), awaited=awaited)
    numbers = [reply.header.request for reply in replies]
    assert numbers == list(range(numbers[0], numbers[0] + 20)) and together.most == WINDOW


@pytest.mark.parametrize("awaited", [False, True])
def test_where_one_of_many_is_refused_what_the_others_brought_is_given_back(
    together: Together, given_back: list[Message], awaited: bool
) -> None:
    together.refused = 10
    with pytest.raises(PromptError, match="too long") as raised:
        asked_together(together.endpoint, twenty(), awaited=awaited)
    assert raised.value.__notes__ == ["in request 10 of 20, counted from 0"]
    assert len({reply.header.request for reply in given_back}) == len(given_back) >= 10


@pytest.mark.parametrize("where", ["decode", "Run"])
def test_what_an_answer_brings_is_given_back_where_an_interrupt_meets_it(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While it is read, or while a run is made of it."""
    connection = WaitingConnection("tcp://127.0.0.1:1", None, Settings())
    meta = ran(13, 0, kept(11), kept(12))
    room = codec if where == "decode" else run_room
    untouched = getattr(room, where)

    def answer(*_: object) -> tuple[bytes, list[bytes]]:
        (request,) = connection._calls
        return codec.encode(Op.RUN, meta, flags=Flag.REPLY, request=request, session=7), []

    def interrupt(*_: object) -> None:
        monkeypatch.setattr(room, where, untouched)
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "_hear", answer)
    monkeypatch.setattr(room, where, interrupt)
    session = Session(connection, connection.drive, None, OPENED)
    parcel = Parcel(connection, session.id)
    with pytest.raises(KeyboardInterrupt):
        connection.drive(ask(session, Op.RUN, messages.Tokens("", None), parcel, None))
    assert list(connection.leftovers.noted) == [(7, 11), (7, 12), (7, 13)] and not connection._calls
    connection.close()
