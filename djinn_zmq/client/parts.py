"""An answer that comes in parts: an iterator, sync or async, over one operation.

    for token in generation: ...              async for token in generation: ...

The request is sent when the first part is asked for. The engine makes parts ahead of their taking up
to a window, then pauses; what is not taken to its end is cancelled: by `close`, or when nothing
refers to the iterator any more.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from djinn_zmq.client.connection import Call, Next, Operation
from djinn_zmq.client.session import Session
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 16  # parts under way at once
OVER = object()


class Stream(Generic[T, R]):
    """An iterator, sync or async, over what an operation comes to step by step.

    result: what it all came to; None until it is over.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._over = False
        self.result: R | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        part = self._session.drive(self._step())
        if hasattr(part, "__await__"):
            part.close()
            raise TypeError("in asyncio code use `async for`")
        if part is OVER:
            raise StopIteration
        return part

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        part = await self._session.drive(self._step())
        if part is OVER:
            raise StopAsyncIteration
        return part

    def finish(self) -> Any:
        """Take all that is left and return `result`."""
        return self._session.drive(self._finish())

    def _finish(self) -> Operation[R | None]:
        while (yield from self._step()) is not OVER:
            pass
        return self.result

    def close(self) -> Any:
        """Take no more: what is still to be done for it is cancelled."""
        return self._session.drive(self._close())

    def _close(self) -> Operation[None]:
        raise NotImplementedError

    def _step(self) -> Operation[Any]:
        """The next, or OVER."""
        raise NotImplementedError


class Parts(Stream[T, R]):
    """What one request is answered with, part by part. result: what the reply came to."""

    def __init__(
        self,
        session: Session,
        ask: Operation[Call],
        take: Callable[[Message], Operation[T]],
        end: Callable[[Message], Operation[R]],
    ) -> None:
        """ask: makes the call, with `parts` set. take, end: what a part, and the reply, come to."""
        super().__init__(session)
        self._ask = ask
        self._take = take
        self._end = end
        self._request: int | None = None

    def _close(self) -> Operation[None]:
        self._over = True
        if self._request is not None:
            self._session.connection.abandon(self._request)
        return
        yield

    def _on_sent(self, request: int) -> None:
        """The request is on its way."""

    def _step(self) -> Operation[Any]:
        if self._over:
            return OVER
        connection = self._session.connection
        try:
            if self._request is None:
                call = yield from self._ask
                self._request = connection.send(call)
                self._on_sent(self._request)
                gone = weakref.finalize(self, connection.abandon_later, self._request)
                gone.atexit = False
            message = yield Next(self._request)
            if message.header.flags & Flag.PART:
                return (yield from self._take(message))
            self.result = yield from self._end(message)
        except BaseException:
            self._over = True
            raise
        self._over = True
        return OVER
