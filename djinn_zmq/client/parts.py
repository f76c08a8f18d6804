"""An answer that comes in parts: an iterator, sync or async, over one operation.

    for token in generation: ...              async for token in generation: ...

The request is sent when the first part is asked for. The engine makes parts ahead of their taking up
to a window, then pauses; what is not taken to its end is cancelled: by `close`, or when nothing
refers to the iterator any more.
"""

import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Generic, Self, TypeVar

from djinn_zmq.client.calls import Call, Next, Operation
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.session import Session
from djinn_zmq.errors import Busy
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag

T = TypeVar("T")
R = TypeVar("R")

WINDOW = 16  # parts under way at once
OVER = object()


class Stream(ABC, Generic[T, R]):
    """An iterator, sync or async, over what an operation comes to step by step.

    result: what it all came to; None until it is over.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._over = False
        self._awaited = False
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

    @abstractmethod
    def _close(self) -> Operation[None]:
        """Cancel what is still to be done."""

    @abstractmethod
    def _step(self) -> Operation[Any]:
        """The next, or OVER. Raises Busy where that is awaited already."""

    def _enter(self) -> None:
        """A step begins. What it comes to is for whoever asked first: who asks beside him is refused before
        he can end it for both. Raises Busy."""
        if self._awaited:
            raise Busy("the next part of this answer is awaited already")
        self._awaited = True


class Parts(Stream[T, R]):
    """What one request is answered with, part by part. result: what the reply came to.

    Its own hooks say what a part and the reply come to: nothing in it refers to itself, so that it
    is cancelled at once when nobody refers to it any more.
    """

    def __init__(self, session: Session, ask: Operation[Call]) -> None:
        """ask: makes the call, with `parts` set."""
        super().__init__(session)
        self._ask = ask
        self._request: int | None = None

    def _take(self, message: Message) -> Operation[Any]:
        """What a part comes to."""
        return message
        yield

    def _end(self, message: Message) -> Operation[Any]:
        """What the reply comes to."""
        return message
        yield

    def _on_sent(self, request: int) -> None:
        """The request is on its way."""

    def _on_arrived(self) -> None:
        """What travelled with the request has arrived, or never will."""

    def _close(self) -> Operation[None]:
        self._over = True
        try:
            if self._request is not None:
                self._session.connection.abandon(self._request)
        finally:
            self._on_arrived()
        return
        yield

    def _send(self, call: Call) -> None:
        connection = self._session.connection
        self._request = connection.send(call)
        self._on_sent(self._request)
        gone = weakref.finalize(self, connection.abandon_later, self._request)
        gone.atexit = False

    def _step(self) -> Operation[Any]:
        if self._over:
            return OVER
        self._enter()
        try:
            if self._request is None:
                self._send((yield from self._ask))
            assert self._request is not None
            message = yield Next(self._request)
            if message.header.flags & Flag.PART:
                return (yield from self._take(message))
            self.result = yield from self._end(message)
        except BaseException:
            self._over = True
            # An interrupt may have come as a part was made of what had.
            if self._request is not None:
                self._session.connection.abandon_later(self._request)
            self._on_arrived()
            raise
        finally:
            self._awaited = False
        self._over = True
        return OVER


class Bundles(Stream[T, R]):
    """What requests, one behind the other, are answered with in parts of several items each."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._parcel: Parcel | None = None  # what travels with the request under way
        self._parts: Parts[Message, Message] | None = None
        self._ready: deque[T] = deque()

    @abstractmethod
    def _more(self) -> Operation[Call] | None:
        """Makes the next call, with what `_pack` gave; None where all have been made."""

    @abstractmethod
    def _items(self, message: Message) -> list[T]:
        """Those of a part."""

    @abstractmethod
    def _end(self, message: Message) -> Operation[None]:
        """The reply of one request has come."""

    def _step(self) -> Operation[Any]:
        self._enter()
        try:
            return (yield from self._item())
        finally:
            self._awaited = False

    def _item(self) -> Operation[Any]:
        while not self._ready:
            if self._parts is None and not self._over:
                ask = self._more()
                self._over = ask is None
                self._parts = None if ask is None else Parts(self._session, ask)
            if self._over or self._parts is None:
                return OVER
            try:
                part = yield from self._parts._step()
                if part is OVER:
                    assert self._parts.result is not None
                    yield from self._end(self._parts.result)
                else:
                    self._ready.extend(self._items(part))
            except BaseException:
                # Also of one while items were made: those behind it would be taken for them.
                self._over = True
                self._parts = None
                self._settle()
                raise
            if part is OVER:
                self._parts = None
                self._settle()
        return self._ready.popleft()

    def _close(self) -> Operation[None]:
        self._over = True
        self._ready.clear()
        if self._parts is not None:
            yield from self._parts._close()
        self._settle()

    def _pack(self, timeout_s: float | None) -> Parcel:
        """What the next request travels with. It comes back when that is answered, or when nothing refers to
        this iterator any more. timeout_s: as a `Parcel` has it."""
        parcel = Parcel(self._session.connection, self._session.id, timeout_s)
        self._dropped = weakref.finalize(self, parcel.drop)
        self._dropped.atexit = False
        self._parcel = parcel
        return parcel

    def _settle(self) -> None:
        if self._parcel is not None:
            self._dropped.detach()
            self._parcel.settle()
            self._parcel = None
