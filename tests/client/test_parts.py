"""Answers that come in parts: iterated, paused by a slow reader, given up.

The server is a script: it says what a test tells it to, over a real socket.
"""

import asyncio
import gc
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import zmq

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.bus.router import Router
from djinn_zmq.client.calls import Call
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.parts import Bundles, Parts, Stream
from djinn_zmq.client.session import Session
from djinn_zmq.errors import Busy, Closed, DjinnError, Lost, PromptError
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op

IT = messages.ModelInfo("it", "", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")
OPENED = messages.Opened(7, IT, 0)


class Script(threading.Thread):
    """Sends parts 0, 1, … *total* - 1 of a TOKENS request as it has credit, then *last*."""

    def __init__(self, path: Path, total: int, last: str | Exception) -> None:
        """last: "reply", "silence", or an error."""
        super().__init__()
        self.total, self.last = total, last
        self.sent = self.mores = 0
        self.cancelled: list[int] = []
        self._context = zmq.Context()
        self._router = Router(self._context, Settings(), None)
        self.endpoint = self._router.bind(f"ipc://{path}")
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            if self._router.socket.poll(20):
                incoming = self._router.receive()
                route, frame, buffers = incoming
                message = codec.decode(frame, buffers)
                with suppress(Lost):
                    self._take(route, message.header, message.meta)
        self._router.close()
        self._context.destroy(linger=0)

    def _take(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        if header.op == Op.HELLO:
            self._reply(route, header, messages.Welcome("", 1, "", b"", (), 0))
        elif header.op == Op.PING:
            self._reply(route, header, messages.Pong("scripted"))
        elif header.op == Op.CANCEL:
            self.cancelled.append(meta.request)
        elif header.op == Op.TOKENS:
            self.sent = 0
            self._give(route, header.request, header.credit)
        elif header.op == Op.MORE:
            assert header.flags & Flag.ONE_WAY
            self.mores += 1
            self._give(route, meta.request, header.credit)

    def _give(self, route: bytes, request: int, credit: int) -> None:
        for _ in range(min(credit, self.total - self.sent)):
            part = messages.Progress("part", self.sent, self.total)
            self._router.send(
                route, codec.encode(Op.TOKENS, part, flags=Flag.PART, request=request)
            )
            self.sent += 1
        header = codec.Header(codec.MAGIC, 1, Op.CANCEL, 0, 0, request, 7, 0, 0)
        if self.sent == self.total and isinstance(self.last, DjinnError):
            self._router.send(route, codec.failure(header, self.last))
        elif self.sent == self.total and self.last == "reply":
            self._reply(route, header, messages.Cancelled(True))

    def _reply(self, route: bytes, header: codec.Header, meta: msgspec.Struct) -> None:
        frame = codec.encode(header.op, meta, flags=Flag.REPLY, request=header.request)
        self._router.send(route, frame)

    def stop(self) -> None:
        self._end.set()
        self.join()


@pytest.fixture
def script(request, monkeypatch) -> Iterator[Script]:
    """A server whose TOKENS are answered in parts."""
    decoder = msgspec.msgpack.Decoder(messages.Progress)
    monkeypatch.setitem(codec._decoders, (int(Flag.PART), int(Op.TOKENS)), decoder)
    total, last = getattr(request, "param", (100, "reply"))
    with tempfile.TemporaryDirectory(prefix="djp") as folder:
        script = Script(Path(folder) / "s", total, last)
        script.start()
        yield script
        script.stop()


class Numbers(Parts[int, bool]):
    def _take(self, message):
        return message.meta.done
        yield

    def _end(self, message):
        return message.meta.found
        yield


def parts_on(server: djinn.Server, window: int = 8) -> Numbers:
    return numbers_on(Session(server.connection, server.drive, None, OPENED), window)


def numbers_on(session: Session, window: int = 8) -> Numbers:
    def ask():
        return Call(Op.TOKENS, messages.Tokens("", None), session=7, parts=window)
        yield

    return Numbers(session, ask())


class Ones(Bundles[int, bool]):
    """The same, as bundles of one."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._asks = [numbers_on(session)]

    def _more(self):
        return self._asks.pop()._ask if self._asks else None

    def _items(self, message):
        return [message.meta.done]

    def _end(self, message):
        self.result = message.meta.found
        return
        yield


def test_all_parts_come_in_order_and_then_what_they_came_to(script: Script) -> None:
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        assert parts.result is None
        assert list(parts) == list(range(100))
        assert parts.result is True and list(parts) == []


def test_no_more_parts_are_under_way_than_the_reader_takes(script: Script) -> None:
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server, window=8)
        for expected in range(50):
            assert next(parts) == expected
            assert script.sent <= expected + 1 + 8
        assert 0 < script.mores <= 50 // 4


@pytest.mark.parametrize("script", [(5, PromptError("enough"))], indirect=True)
def test_an_error_comes_after_the_parts_before_it(script: Script) -> None:
    with djinn.connect(script.endpoint) as server:
        parts, taken = parts_on(server), []
        with pytest.raises(PromptError, match="enough"):
            taken.extend(parts)
        assert taken == [0, 1, 2, 3, 4] and list(parts) == []


def test_what_is_closed_or_dropped_is_cancelled(script: Script) -> None:
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        assert next(parts) == 0
        parts.close()
        assert list(parts) == []
        assert next(parts_on(server)) == 0  # and dropped
        server.ping()  # any request sends what finalizers left
        assert len(set(script.cancelled)) == 2


def test_what_is_interrupted_as_a_part_is_made_is_cancelled(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Numbers, "_take", interrupted)
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        with pytest.raises(KeyboardInterrupt):
            next(parts)
        server.ping()  # behind what is said of it
        assert list(parts) == [] and len(script.cancelled) == 1


class Packed(Ones):
    """Bundles of two, whose request travels with something."""

    def _more(self):
        ask = super()._more()
        if ask is not None:
            self._pack(None)
        return ask

    def _items(self, message):
        return super()._items(message) * 2


@pytest.mark.parametrize("how", ["finished", "closed", "dropped", "interrupted"])
def test_what_travels_with_a_bundle_comes_back_once_and_what_is_left_of_it_is_cancelled(
    script: Script, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    back: list[str] = []
    monkeypatch.setattr(Parcel, "settle", lambda _: back.append("settled"))
    monkeypatch.setattr(Parcel, "drop", lambda _: back.append("dropped"))
    with djinn.connect(script.endpoint) as server:
        bundles = Packed(Session(server.connection, server.drive, None, OPENED))
        assert next(bundles) == 0 and not back
        if how == "finished":
            assert len(list(bundles)) == 199
        elif how == "closed":
            bundles.close()
            server.ping()  # behind it
            assert len(script.cancelled) == 1  # also while something still refers to it
        elif how == "interrupted":
            assert next(bundles) == 0
            monkeypatch.setattr(bundles, "_items", None)  # any error
            with pytest.raises(TypeError):
                next(bundles)
        if how != "dropped":
            assert back == ["settled"] and list(bundles) == []
        del bundles
        gc.collect()
        assert back == ["dropped" if how == "dropped" else "settled"]
        server.ping()  # behind what is said of it
        assert len(set(script.cancelled)) == (how != "finished")


def test_a_bundle_that_is_interrupted_as_its_items_are_made_is_over_and_skips_none(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with djinn.connect(script.endpoint) as server:
        bundles = Ones(Session(server.connection, server.drive, None, OPENED))
        assert next(bundles) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Ones, "_items", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(bundles)
        server.ping()  # behind what is said of it
        assert list(bundles) == [] and len(script.cancelled) == 1


def test_a_connection_that_is_closed_ends_its_parts_with_an_error(script: Script) -> None:
    with djinn.connect(script.endpoint) as server:
        parts = parts_on(server)
        next(parts)
    with pytest.raises(Closed):
        list(parts)


def test_they_are_awaited_in_asyncio_code(script: Script) -> None:
    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            parts = parts_on(server)
            with pytest.raises(TypeError, match="async for"):
                next(parts)
            assert [part async for part in parts_on(server)] == list(range(100))

    asyncio.run(main())


@pytest.mark.parametrize("script", [(3, "silence")], indirect=True)
def test_cancelling_the_task_that_waits_cancels_the_answer(script: Script) -> None:
    async def main() -> None:
        async with aio.connect(script.endpoint) as server:
            parts = parts_on(server)
            assert [await anext(parts) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(parts), 0.01)
            assert [part async for part in parts] == []
            await server.ping()
            assert len(script.cancelled) == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["parts", "bundles"])
def test_who_asks_for_a_part_that_is_awaited_is_refused_and_ends_it_for_nobody(
    script: Script, kind: str
) -> None:
    with djinn.connect(script.endpoint) as server:
        session = Session(server.connection, server.drive, None, OPENED)
        parts: Stream[int, bool] = numbers_on(session) if kind == "parts" else Ones(session)
        for expected in range(2):  # the first of all, and one behind it
            waiting = parts._step()  # as a task of asyncio's
            wanted = next(waiting)
            with pytest.raises(Busy, match="awaited already"):
                next(parts)
            with pytest.raises(StopIteration) as end:
                waiting.send(server.connection._exchange(wanted))
            assert end.value.value == expected
        assert list(parts) == list(range(2, 100)) and parts.result is True
