"""What happens on a server, as it happens: published, and the journal where something was missed."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self

from djinn_zmq.bus.news import ALL, CHANGED_S, Subscriber
from djinn_zmq.client import checks
from djinn_zmq.client.calls import LOOK_S, Call, Heard, Operation
from djinn_zmq.errors import Busy, Closed, Lost
from djinn_zmq.wire import codec
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import EVENT_KINDS, Event, EventsReply, Published
from djinn_zmq.wire.tiers import Events as Asked

TAKEN_LIMIT = 1000
NONE_BEHIND = 2**63 - 1  # asks for no event, only for where they are published


class Events:
    """Iterate for events as they come, `async for` in asyncio code: first those that have happened
    since *after*, then all that will. None is left out, however slowly they are taken, as long as
    the server still knows them. Ends with its connection, or `close`.
    """

    def __init__(self, server: Any, kinds: str | Sequence[str], after: int) -> None:
        several = checks.several("kinds", kinds, "a kind, or several", alone=(str,))
        self._server = server
        self._kinds = tuple(checks.one_of("kinds", kind, EVENT_KINDS) for kind in several)
        # All up to here have been given, or are ready.
        self._base = checks.whole("after", after, least=0)
        self._seen: dict[bytes, int] = {}  # by topic: the last event since
        self._taken: set[int] = set()  # those published since
        self._ready: deque[Event] = deque()
        self._subscriber: Subscriber | None = None
        self._end: Any = None
        self._in_use = threading.Lock()  # by the one operation that may be
        self._closed = False

    def __repr__(self) -> str:
        kinds = f" of kind {', '.join(self._kinds)}" if self._kinds else ""
        return f"<events{kinds} of {self._server!r}{', closed' if self._closed else ''}>"

    def so_far(self) -> Any:
        """Those that have happened: a list, oldest first. Does not wait. Raises Busy while another waits for
        the next."""
        return self._server.drive(self._so_far())

    def _so_far(self) -> Operation[list[Event]]:
        self._enter()
        try:
            yield from self._catch_up()
            found = list(self._ready)
            self._ready.clear()
            return found
        finally:
            self._leave()

    def _enter(self) -> None:
        """What has come is told once, and a socket is for one thread at a time. Raises Busy."""
        if not self._in_use.acquire(blocking=False):
            raise Busy("the next event is awaited already, by another thread or task")

    def _leave(self) -> None:
        self._in_use.release()
        if self._closed:
            self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if not hasattr(self._server.connection, "drive"):
            raise TypeError("in asyncio code use `async for`")
        step: Any = None
        operation = self._next()
        try:
            wanted = next(operation)
            while True:
                if isinstance(wanted, Heard):  # not in `drive`: others may use the connection
                    wanted.subscriber.wait(LOOK_S)
                    step = self._server.connection.look()
                else:
                    step = self._server.connection.drive(_one(wanted))
                wanted = operation.send(step)
        except StopIteration as end:
            event: Event | None = end.value
        finally:
            operation.close()  # now: an interpreter keeps its last error, and all that this refers to
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._server.drive(self._next())
        if event is None:
            raise StopAsyncIteration
        return event

    def _next(self) -> Operation[Event | None]:
        self._enter()  # before it is looked whether it is closed: `close` does it the other way round
        try:
            while not self._ready and not self._closed:
                if self._server.connection.closed:
                    raise Closed("the connection is closed")
                if self._subscriber is None:
                    yield from self._begin()
                assert self._subscriber is not None
                for topic, frame in self._subscriber.take():
                    yield from self._take(topic, frame)
                if not self._ready:
                    yield Heard(self._subscriber)
            return self._ready.popleft() if self._ready else None
        finally:
            self._leave()

    def _begin(self) -> Operation[None]:
        """Listen, and only then ask for what was before."""
        connection = self._server.connection
        reply = yield Call(Op.EVENTS, Asked(NONE_BEHIND))
        where: EventsReply = reply.meta
        kinds = self._kinds or ("",)
        topics = [f"{scope}/{kind}" for scope in (where.scope, ALL) for kind in kinds]
        endpoint = where.endpoint.replace("*", _host(connection.endpoint))
        subscriber = Subscriber(endpoint, connection.settings, connection.keys, topics)
        self._end = weakref.finalize(self, subscriber.close)
        limit_s = time.monotonic() + CHANGED_S
        try:
            while not subscriber.holds:
                subscriber.take()  # what comes so early is in the journal by now
                if not subscriber.holds:
                    if time.monotonic() > limit_s:
                        raise Lost(f"no events come from {endpoint}")
                    yield Heard(subscriber)
            yield from self._catch_up()
        except BaseException:  # it begins anew, if it is asked once more
            self._end()
            raise
        self._subscriber = subscriber

    def _take(self, topic: bytes, frame: bytes) -> Operation[None]:
        published: Published = codec.decode(frame).meta
        event = published.event
        if event.number <= self._base:
            return
        missed = published.before > self._seen.get(topic, self._base)
        if missed or len(self._taken) > TAKEN_LIMIT:
            yield from self._catch_up()
        else:
            self._seen[topic] = event.number
            self._taken.add(event.number)
            self._ready.append(event)

    def _catch_up(self) -> Operation[None]:
        """All that the server knows behind the last one, however it was told."""
        while True:
            reply = yield Call(Op.EVENTS, Asked(self._base))
            events: tuple[Event, ...] = reply.meta.events
            for event in events:
                wanted = not self._kinds or event.kind in self._kinds
                if wanted and event.number not in self._taken:
                    self._ready.append(event)
            if not events:
                break
            self._base = events[-1].number
        self._seen.clear()
        self._taken = {number for number in self._taken if number > self._base}

    def close(self) -> None:
        """Listen no more. Who waits for an event meanwhile, in another thread or task, finds out when it looks
        next (LOOK_S), is given none, and hangs up: a socket is for one thread at a time."""
        self._closed = True
        if self._end is not None and self._in_use.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._in_use.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _one(call: Call) -> Generator[Any, Any, Any]:
    return (yield call)


def _host(endpoint: str) -> str:
    """Of "tcp://HOST:PORT"."""
    return endpoint.partition("://")[2].rpartition(":")[0]
