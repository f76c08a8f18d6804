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
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from djinn_zmq.bus.keys import ClientKeys, client_keys
from djinn_zmq.client.connection import Call, Connection, Operation
from djinn_zmq.client.local import private_server
from djinn_zmq.client.model import Model
from djinn_zmq.client.server import CONNECT_S, Server, reporter
from djinn_zmq.errors import DjinnError, Lost, Unreachable
from djinn_zmq.settings import Settings, default_endpoint, runtime_dir
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Progress

T = TypeVar("T")


class AsyncConnection(Connection):
    """A connection whose operations are awaited. Belongs to the event loop it was made in."""

    def __init__(
        self, endpoint: str, keys: ClientKeys | None, settings: Settings, *, shared: bool = True
    ) -> None:
        super().__init__(endpoint, keys, settings, shared=shared)
        self._loop = asyncio.get_running_loop()
        self._futures: dict[int, asyncio.Future[Message]] = {}
        self._watched = [self.bus_fileno(), self.monitor_fileno()]
        for fd in self._watched:
            self._loop.add_reader(fd, self._on_readable)

    async def run(self, operation: Operation[T]) -> T:
        """Run *operation* to its end, awaiting each reply."""
        try:
            step = next(operation)
            while True:
                try:
                    reply = await self._exchanged(step)
                except DjinnError as exc:
                    step = operation.throw(exc)
                else:
                    step = operation.send(reply)
                self._watch_lease()
        except StopIteration as end:
            return end.value
        finally:
            operation.close()

    async def _exchanged(self, step: Call | list[Call]) -> Message | list[Message]:
        if isinstance(step, Call):
            return await self._answer(step)
        return [await self._answer(call) for call in step]

    async def _answer(self, call: Call) -> Message:
        request = self.send(call)
        future = self._futures[request] = self._loop.create_future()
        # The socket's descriptor is edge-triggered: what came while we sent is not told again.
        self._on_readable()
        limit_s = None if call.timeout_s is None else call.timeout_s + 1.0
        try:
            return await asyncio.wait_for(future, limit_s)
        except TimeoutError as exc:
            raise Unreachable(f"no answer from {self.endpoint} in {call.timeout_s:g} s") from exc
        except asyncio.CancelledError:
            self.cancel(request, call.session)
            raise
        finally:
            self._futures.pop(request, None)
            if self.waits_for(request):
                self.give_up(request)

    def _on_readable(self) -> None:
        if self.closed:
            return
        while (frames := self.receive()) is not None:
            self.take(*frames)
        if not self.alive():
            self._stop_watching()
            self.fail_all(Lost(f"the server at {self.endpoint} is gone"))
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
        if self.lease is not None and len(self._watched) == 2:
            fd = self.lease.socket.fileno()
            self._watched.append(fd)
            self._loop.add_reader(fd, self._on_readable)

    def _stop_watching(self) -> None:
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._watched.clear()

    def close(self) -> None:
        self._stop_watching()
        super().close()


class AsyncServer(Server):
    """A `Server` whose methods, and those of all it gives, return awaitables."""

    connection: AsyncConnection

    def drive(self, operation: Operation[Any]) -> Awaitable[Any]:
        return self.connection.run(operation)


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
        await self._server.close()


def connect(
    endpoint: str | None = None,
    *,
    key: str | os.PathLike[str] | None = None,
    server_key: str | os.PathLike[str] | None = None,
    timeout_s: float = CONNECT_S,
    shared: bool = True,
    progress: Callable[[Progress], None] | None | bool = True,
) -> _Connecting:
    """As `djinn_zmq.connect`: await it, or enter it with `async with`."""

    async def opening() -> AsyncServer:
        keys = client_keys(key, server_key) if key is not None else None
        where = endpoint or default_endpoint()
        connection = AsyncConnection(where, keys, Settings(), shared=shared)
        server = AsyncServer(connection, reporter(progress))
        try:
            await server.drive(server.hello(timeout_s))
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
    progress: Callable[[Progress], None] | None | bool = True,
) -> AsyncIterator[Model]:
    """As `djinn_zmq.local`, with `async with`."""
    folder = Path(tempfile.mkdtemp(prefix="local-", dir=runtime_dir()))
    private = private_server(folder, device, dtype)
    try:
        endpoint = await asyncio.to_thread(private.__enter__)
        try:
            async with connect(endpoint, progress=progress) as server:
                yield await server.model(os.fspath(model))
        finally:
            await asyncio.to_thread(private.__exit__, None, None, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
