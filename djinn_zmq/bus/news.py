"""Events on their way: an XPUB at the server, a SUB at each who listens.

    topic    SCOPE/KIND      the scope is whose event it is: "all", or a token that its owner is told
    frames   [topic][header and meta]

A PUB tells everything to everybody who asks. Here each subscription is looked at first, and one that
begins with no scope somebody was told is not made: nobody hears what is not his to know.
Nor is one made while it is not certain whose it is (`Publisher.serve`): who asked for it is not answered.
A subscription of SCOPE/?WORD is answered with that topic alone: those made before it hold by then.
"""

import secrets
from collections.abc import Callable, Sequence

import zmq

from djinn_zmq.bus import limits
from djinn_zmq.bus.keys import ClientKeys, ServerKeys
from djinn_zmq.bus.limits import DONTWAIT
from djinn_zmq.errors import AddressInUse, Lost, StartError
from djinn_zmq.settings import Settings

ALL = "all"
SEPARATOR = b"/"
SYNC = b"?"
TOPIC_LIMIT = 128  # bytes
END, BEGIN = b"\0", b"\1"  # first byte of what XPUB tells of a subscription
AT_ONCE = 64  # messages that are passed over before others than this socket are looked at
CHANGED_S = 5.0  # a subscription holds within this time, or the server is gone


class Scopes:
    """Who may hear what: a token for each owner that has asked."""

    def __init__(self) -> None:
        self._tokens: dict[str, str] = {}

    def told(self, owner: str) -> str:
        """The scope of *owner*'s events, to be told to nobody else."""
        return self._tokens.setdefault(owner, secrets.token_hex(16))

    def of(self, owner: str) -> str | None:
        """The same; None where nobody was told. owner "": of everybody's events."""
        return self._tokens.get(owner) if owner else ALL

    def forget(self, owner: str) -> str | None:
        """*owner* is gone for good. Returns the scope that nobody has any more; None: there was none."""
        return self._tokens.pop(owner, None)

    def known(self, scope: bytes) -> bool:
        return scope == ALL.encode() or any(
            secrets.compare_digest(scope, token.encode()) for token in self._tokens.values()
        )


class Publisher:
    """A bound XPUB. Belongs to one thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        settings: Settings,
        keys: ServerKeys | None,
        scopes: Scopes,
        counted: frozenset[bytes],
        on_change: Callable[[], None],
    ) -> None:
        """keys: as a Router's. counted: the kinds of which it is to be known whether somebody listens to them;
        others may be anything. on_change: called when somebody has begun, or ended, to listen to one."""
        self.socket = context.socket(zmq.XPUB)
        limits.apply(self.socket, settings)
        self.socket.setsockopt(zmq.XPUB_MANUAL, 1)
        if keys is not None:
            keys.secure(self.socket)
        self.fd, self.unheard = -1, set[int]()  # of `bus.poll`
        # How many hold each topic. By topic, not by kind: anybody can end what he never held.
        self._holders: dict[bytes, int] = {}
        self._scopes = scopes
        self._counted = counted
        self._on_change = on_change
        self._in_step = True
        self.endpoint = ""

    @property
    def kinds(self) -> set[bytes]:
        """Of those that are counted, what somebody listens to."""
        return {topic.partition(SEPARATOR)[2] for topic in self._holders}

    def bind(self, endpoint: str) -> str:
        """Raises AddressInUse, StartError."""
        try:
            self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
            self.socket.bind(endpoint)
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EADDRINUSE:
                raise AddressInUse(f"{endpoint} is in use by another process") from exc
            raise StartError(f"cannot bind {endpoint}: {exc.strerror}") from exc
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return self.endpoint

    def publish(self, scope: str, kind: str, frame: bytes) -> None:
        """To all who listen; who does not read loses it, and finds out."""
        self.unheard.add(self.fd)
        self.socket.send_multipart([f"{scope}/{kind}".encode(), frame], DONTWAIT)

    def serve(self) -> bool:
        """Look at one of the subscriptions that were asked for. False where there is none.

        libzmq makes a subscription for whoever is first in a queue that loses one with each message that is
        received (4.3.5, xpub.cpp, xrecv), those too that are no subscriptions and put nobody there: behind one,
        a subscription would be made for who asked for a later one. Until nothing waits any more, none is.
        """
        for _ in range(AT_ONCE):
            try:
                asked = self.socket.recv(DONTWAIT)
            except zmq.Again:
                self._in_step = True
                return False
            self._look_at(asked)
            if self._in_step:
                break
        return True

    def _look_at(self, asked: bytes) -> None:
        change, topic = asked[:1], asked[1:]
        if change not in (END, BEGIN):
            self._in_step = False
            return
        scope, _, kind = topic.partition(SEPARATOR)
        if len(topic) > TOPIC_LIMIT:
            return
        if change == END:
            if self._in_step:
                self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)
            self._count(topic, kind, -1)
        elif self._scopes.known(scope):
            if self._in_step:
                self.socket.setsockopt(zmq.SUBSCRIBE, topic)
            if not kind.startswith(SYNC):  # if it was not made, either: its end will be told
                self._count(topic, kind, 1)
            elif self._in_step:
                self.socket.send_multipart([topic, b""], DONTWAIT)

    def _count(self, topic: bytes, kind: bytes, change: int) -> None:
        if kind not in self._counted:
            return
        # libzmq tells of the end of subscriptions that were never made, too.
        left = max(0, self._holders.pop(topic, 0) + change)
        if left:
            self._holders[topic] = left
        self._on_change()

    def close(self) -> None:
        self.socket.close(linger=0)


class Subscriber:
    """A connected SUB. Belongs to one thread."""

    def __init__(
        self, endpoint: str, settings: Settings, keys: ClientKeys | None, topics: Sequence[str]
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self._end = limits.end_with(self, self.context, self.socket)
        limits.apply(self.socket, settings)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        if keys is not None:
            keys.secure(self.socket)
        self.socket.connect(endpoint)
        scope = topics[0].partition("/")[0]
        self._sync = f"{scope}/?{secrets.token_hex(8)}".encode()
        for topic in (*(topic.encode() for topic in topics), self._sync):
            self.socket.setsockopt(zmq.SUBSCRIBE, topic)
        self.holds = False  # do the subscriptions?

    def take(self) -> list[tuple[bytes, bytes]]:
        """Topics and frames that have come. Never waits."""
        found: list[tuple[bytes, bytes]] = []
        while True:
            try:
                topic, frame = self.socket.recv_multipart(DONTWAIT)
            except zmq.Again:
                return found
            except ValueError as exc:
                raise Lost("what came is no event") from exc
            if topic == self._sync:
                self.holds = True
            elif not topic.partition(SEPARATOR)[2].startswith(SYNC):  # that another's hold
                found.append((topic, frame))

    def wait(self, timeout_s: float) -> bool:
        return bool(self.socket.poll(int(timeout_s * 1000)))

    def fileno(self) -> int:
        return int(self.socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self._end()
