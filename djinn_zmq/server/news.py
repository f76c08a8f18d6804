"""The journal's events, published: over ipc beside the bus's own socket, over tcp at a port of its own."""

from collections.abc import Callable
from pathlib import Path

import zmq

from djinn_zmq.bus.keys import ServerKeys
from djinn_zmq.bus.news import Publisher, Scopes
from djinn_zmq.bus.poll import Poll
from djinn_zmq.server.journal import Journal
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tiers import Event, Published

OF_RUNS = frozenset(
    {b"", b"run", b"stop", b"resume"}
)  # subscriptions that make engines tell of runs


class News:
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        settings: Settings,
        journal: Journal,
        on_wanted: Callable[[bool], None],
    ) -> None:
        """on_wanted: told when runs are to be told of, and when nobody listens any more."""
        self._context = context
        self._settings = settings
        self._scopes = Scopes()
        self._publishers: dict[bytes, Publisher] = {}
        self._last: dict[tuple[str, str], int] = {}  # by topic: the last event
        self._on_wanted = on_wanted
        self._wanted = False
        self._path: Path | None = None
        journal.listeners.append(self._on_event)

    def bind_ipc(self, tag: bytes, path: Path) -> None:
        """*path*: of the bus's socket. Its lock is held."""
        self._path = path.with_name(f"{path.name}.news")
        self._bind(tag, f"ipc://{self._path}", None)

    def bind_tcp(self, tag: bytes, bus: str, port: int, keys: ServerKeys | None) -> None:
        """*bus*: the bus's endpoint, "tcp://HOST:PORT". port: 0: any that is free."""
        self._bind(tag, f"{bus.rpartition(':')[0]}:{port or '*'}", keys)

    def _bind(self, tag: bytes, endpoint: str, keys: ServerKeys | None) -> None:
        publisher = Publisher(
            self._context, self._settings, keys, self._scopes, OF_RUNS, self._on_change
        )
        self._publishers[tag] = publisher
        publisher.bind(endpoint)

    def watch(self, poll: Poll) -> None:
        for publisher in self._publishers.values():
            poll.watch_used(publisher, publisher.serve)

    def where(self, tag: bytes) -> str:
        """The endpoint for peers of the router *tag*; "*" stands for the host that they know."""
        endpoint = self._publishers[tag].endpoint
        if endpoint.startswith("ipc:"):
            return endpoint
        return f"tcp://*:{endpoint.rpartition(':')[2]}"

    def scope(self, owner: str) -> str:
        return self._scopes.told(owner)

    def forget(self, owner: str) -> None:
        """*owner* is gone and does not come back: with each that did, more would be kept."""
        scope = self._scopes.forget(owner)
        for topic in [topic for topic in self._last if topic[0] == scope]:
            del self._last[topic]

    def _on_event(self, event: Event, owner: str) -> None:
        scope = self._scopes.of(owner)
        if scope is None:  # nobody was told under what to listen
            return
        before = self._last.get((scope, event.kind), 0)
        self._last[scope, event.kind] = event.number
        frame = codec.encode(Op.EVENTS, Published(event, before), flags=Flag.PART)
        for publisher in self._publishers.values():
            publisher.publish(scope, event.kind, frame)

    def _on_change(self) -> None:
        wanted = any(one.kinds for one in self._publishers.values())
        if wanted != self._wanted:
            self._wanted = wanted
            self._on_wanted(wanted)

    def close(self) -> None:
        for publisher in self._publishers.values():
            publisher.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
