"""The same client for asyncio: `connect`, `local`, and awaitables wherever there is something to
wait for.

    async with djinn_zmq.aio.connect() as server:
        model = await server.model("tiny")
        run = await model.run("the capital of france is", stop_at=2)
        row = await run.checkpoint.hidden[0, -1]
        done = await run.checkpoint.resume()
        print(await done.top(5))

Every method, and every property or index that has to ask the server, gives an awaitable of what its
sync form returns. Many may wait at once on one connection; cancelling one cancels its run. There is
no thread: the socket is watched by the event loop.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from djinn_zmq.bus.keys import ClientKeys
from djinn_zmq.bus.lane import Lane
from djinn_zmq.client import checks
from djinn_zmq.client.blocks import AsyncBlock
from djinn_zmq.client.calls import LOOK_S, Arriving, Call, Heard, Next, Operation, Step
from djinn_zmq.client.connection import WINDOW, Connection
from djinn_zmq.client.local import check, private_server, threads_of
from djinn_zmq.client.model import Model
from djinn_zmq.client.server import CONNECT_S, Server, keys_of, reporter
from djinn_zmq.errors import Closed, DjinnError
from djinn_zmq.settings import Settings, default_endpoint, runtime_dir
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Progress

T = TypeVar("T")


class AsyncConnection(Connection):
    """A connection whose operations are awaited. Belongs to the event loop it was made in."""

    def __init__(
        self,
        endpoint: str,
        keys: ClientKeys | None,
        settings: Settings,
        *,
        shared: bool = True,
        lane: bool = True,
    ) -> None:
        super().__init__(endpoint, keys, settings, shared=shared, lane=lane)
        self._loop = asyncio.get_running_loop()
        self._futures: dict[int, asyncio.Future[Message]] = {}
        self._coming: dict[int, asyncio.Future[None]] = {}  # who waits for a part of an answer
        self._bells: set[int] = set()  # of lanes, watched as well
        self._watched = self._dealer.filenos()
        for fd in self._watched:
            self._loop.add_reader(fd, self._on_readable)

    async def run(self, operation: Operation[T]) -> T:
        """Run *operation* to its end, awaiting each reply."""
        if asyncio.get_running_loop() is not self._loop:  # whose selector nobody may be at any more
            operation.close()
            raise Closed("the connection belongs to the event loop it was made in: connect anew")
        try:
            step = next(operation)
            while True:
                try:
                    reply = await self._exchanged(step)
                except DjinnError as exc:
                    step = operation.throw(exc)
                else:
                    step = operation.send(reply)
        except StopIteration as end:
            return end.value
        finally:
            operation.close()
            self._watch_lease()  # the first operation is the hello, which may bring one

    async def _exchanged(self, step: Step) -> Message | list[Message] | None:
        if isinstance(step, Call):
            return await self._answer(self._ask(step), step)
        if isinstance(step, Next):
            return await self._part(step.request, step.timeout_s)
        if isinstance(step, Heard):
            await self._heard(step)
            return None
        replies: list[Message] = []
        sent: deque[tuple[int, Call]] = deque()
        try:
            for call in step:
                if len(sent) == WINDOW:
                    replies.append(await self._answer(*sent.popleft()))
                sent.append((self._ask(call), call))
            while sent:
                replies.append(await self._answer(*sent.popleft()))
        except (DjinnError, asyncio.CancelledError) as exc:
            exc.add_note(f"in request {len(replies)} of {len(step)}, counted from 0")
            for reply in replies:
                self.give_back(reply)
            if isinstance(exc, asyncio.CancelledError):
                for one in sent:
                    self._cancel(*one)
            raise
        finally:
            for request, _ in sent:  # one before them failed: these are not awaited
                self._forget(request)
        return replies

    def _ask(self, call: Call) -> int:
        request = self.send(call)
        self._futures[request] = self._loop.create_future()
        self._look_again()
        return request

    async def _answer(self, request: int, call: Call) -> Message:
        limit_s, reply = call.waits_until(), self._futures[request]
        try:
            while not reply.done():
                left_s = None if limit_s is None else self._left_s(call, limit_s)
                await asyncio.wait({reply}, timeout=left_s)
                if not reply.done() and self.left_alone():
                    raise self.gone()
                if not reply.done() and call.late(limit_s):
                    self._forget(request)  # what comes while the server is asked is given back
                    raise await self.run(self.why_late(call))
            return self.settle(request, call)
        except asyncio.CancelledError:
            self._cancel(request, call)
            raise
        finally:
            self._forget(request)

    def _cancel(self, request: int, call: Call) -> None:
        """The task that asked *call* was cancelled."""
        if not self.closed:
            with suppress(DjinnError):  # who cancels is not to get another error
                self.cancel(request, call.session)
            self._look_again()

    def _left_s(self, call: Call, limit_s: float) -> float:
        """For how long to wait before it is looked at once more whether *call* is late."""
        left_s = limit_s + call.held_s - time.perf_counter()
        return max(LOOK_S, left_s) if self.met else max(0.0, min(LOOK_S, left_s))

    async def _part(self, request: int, timeout_s: float | None = None) -> Message | None:
        self._look_again()
        if not self.has_news(request):
            coming = self._coming[request] = self._loop.create_future()
            call = self._calls[request]
            limit_s = call.waits_until()
            until_s = None if timeout_s is None else time.monotonic() + timeout_s
            try:
                while not coming.done():
                    left_s = None if limit_s is None else self._left_s(call, limit_s)
                    if until_s is not None:
                        left_s = max(0.0, until_s - time.monotonic())
                    await asyncio.wait({coming}, timeout=left_s)
                    if coming.done():
                        break
                    if until_s is not None and time.monotonic() >= until_s:
                        return None
                    if call.late(limit_s):
                        self.give_up(request)
                        raise await self.run(self.why_late(call))
            except asyncio.CancelledError:
                with suppress(DjinnError):  # who cancels is not to get another error
                    self.abandon(request)
                self._look_again()
                raise
            finally:
                del self._coming[request]
        return self.take_part(request)

    def _send_more(self, request: int, call: Call, arriving: Arriving) -> None:
        super()._send_more(request, call, arriving)
        self._look_again()

    async def _heard(self, step: Heard) -> None:
        """The socket is quiet: it has just been taken empty."""
        fd, came = step.subscriber.fileno(), self._loop.create_future()
        self._loop.add_reader(fd, lambda: came.done() or came.set_result(None))
        try:
            await asyncio.wait({came}, timeout=LOOK_S)
        finally:
            self._loop.remove_reader(fd)
        if not self.closed and not self._watched:
            raise self.gone()

    def _forget(self, request: int) -> None:
        future = self._futures.pop(request, None)
        if future is not None and future.done() and not future.cancelled():
            future.exception()  # seen, though nobody waits for it any more
        if self.waits_for(request):
            self.give_up(request)

    def check_waits(self) -> None:
        raise TypeError("in asyncio code use `async with`")

    def _look_again(self) -> None:
        """After every send: the socket's descriptor is edge-triggered, so what came while we sent
        is not told again."""
        self._on_readable()

    def _on_readable(self) -> None:
        if self.closed:
            return
        while self._take_one():
            pass
        if not self._watched or not self.alive():  # once gone it stays gone
            self._stop_watching()
            self.fail_all(self.gone())
        self._tell_waiting()

    def _take_one(self) -> bool:
        """Take a message that is there. False where there is none."""
        try:
            frames = self.receive()
            if frames is None:
                return False
            self.take(*frames)
        except DjinnError as exc:
            self.fail_all(exc)  # no message of this protocol: whose answer it was, nobody can say
        except Exception as exc:  # noqa: BLE001  the caller's own progress function
            self._loop.call_exception_handler({"message": "progress failed", "exception": exc})
        return True

    def _tell_waiting(self) -> None:
        for request, coming in self._coming.items():
            if not coming.done() and self.has_news(request):
                coming.set_result(None)
        for request, future in list(self._futures.items()):
            reply = self.reply_to(request)
            if reply is None or future.done():
                continue
            if isinstance(reply, DjinnError):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    def _watch_lease(self) -> None:
        """Its end of file is how a server on this machine says that it died."""
        if self.sharing.lease is not None and len(self._watched) == 2 and not self.closed:
            fd = self.sharing.lease.socket.fileno()
            self._watched.append(fd)
            self._loop.add_reader(fd, self._on_readable)

    def _drop_broken(self, lane: Lane, error: DjinnError) -> None:
        super()._drop_broken(lane, error)
        self._tell_waiting()

    def _on_lanes_change(self) -> None:
        bells = {lane.fileno() for lane in self.lanes}
        for fd in bells - self._bells:
            self._loop.add_reader(fd, self._on_readable)
        for fd in self._bells - bells:
            self._loop.remove_reader(fd)
        self._bells = bells

    def _stop_watching(self) -> None:
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._watched.clear()

    def close(self) -> None:
        self._stop_watching()
        self.fail_all(Closed("the connection was closed while this waited"))
        self._tell_waiting()
        super().close()


class AsyncServer(AsyncBlock, Server):
    """A `Server` whose methods, and those of all it gives, return awaitables."""

    connection: AsyncConnection

    def __init__(
        self, connection: AsyncConnection, progress: Callable[[Progress], None] | None
    ) -> None:
        super().__init__(connection, connection.run, progress)
        self._opening: dict[str, asyncio.Lock] = {}

    def model(self, name: str | os.PathLike[str]) -> Any:
        return self._model_once(checks.model("name", name))

    async def _model_once(self, name: str) -> Model:
        # Tasks that ask for one name at a time get one session, as its second asker does.
        async with self._opening.setdefault(name, asyncio.Lock()):
            return await self.drive(self._model(name))


class _Connecting:
    """Awaited, or entered with `async with`, it gives the server."""

    def __init__(self, opening: Callable[[], Awaitable[AsyncServer]]) -> None:
        self._opening = opening
        self._server: AsyncServer | None = None

    def __await__(self) -> Generator[Any, None, AsyncServer]:
        return self._opening().__await__()

    async def __aenter__(self) -> AsyncServer:
        self._server = await self._opening()
        return self._server

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        await self._server.__aexit__(kind, exc, trace)


def connect(
    endpoint: str | None = None,
    *,
    key: str | os.PathLike[str] | None = None,
    server_key: str | os.PathLike[str] | None = None,
    timeout_s: float = CONNECT_S,
    shared: bool = True,
    lane: bool = True,
    progress: Callable[[Progress], None] | None | bool = True,
) -> _Connecting:
    """As `djinn_zmq.connect`: await it, or enter it with `async with`."""

    async def opening() -> AsyncServer:
        keys = keys_of(key, server_key)
        where = default_endpoint() if endpoint is None else endpoint
        connection = AsyncConnection(where, keys, Settings(), shared=shared, lane=lane)
        try:
            server = AsyncServer(connection, reporter(progress))
            await server.drive(server._hello(timeout_s))
        except BaseException:
            connection.close()
            raise
        return server

    return _Connecting(opening)


@asynccontextmanager
async def local(
    model: str | os.PathLike[str],
    device: str = "cpu",
    *,
    dtype: str = "auto",
    threads: int | None = None,
    progress: Callable[[Progress], None] | None | bool = True,
) -> AsyncIterator[Model]:
    """As `djinn_zmq.local`, with `async with`."""
    check(model, device, dtype)
    more = threads_of(threads)
    folder = Path(tempfile.mkdtemp(prefix="local-", dir=runtime_dir()))
    private = private_server(folder, device, dtype, *more)
    starting = asyncio.ensure_future(asyncio.to_thread(private.__enter__))
    try:
        endpoint = await asyncio.shield(starting)
        async with connect(endpoint, progress=progress) as server:
            yield await server.model(os.fspath(model))
    finally:
        await asyncio.shield(asyncio.ensure_future(_end(private, starting, folder)))


async def _end(
    private: AbstractContextManager[str], starting: asyncio.Future[str], folder: Path
) -> None:
    """End the private server, also one that is still starting: a thread cannot be cancelled."""
    try:
        with suppress(DjinnError):  # where it did not start, that has been raised already
            await starting
            await asyncio.to_thread(private.__exit__, None, None, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
