"""A connection to a server, as a user sees it."""

import os
import sys
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from djinn_zmq.client import checks
from djinn_zmq.client.blocks import Block
from djinn_zmq.client.calls import CLOSE_S, Call, Operation
from djinn_zmq.client.connection import Connection
from djinn_zmq.client.model import Model
from djinn_zmq.client.session import Session, opened
from djinn_zmq.client.stops import breaks_of
from djinn_zmq.client.waiting import WaitingConnection
from djinn_zmq.errors import Busy, Closed, DjinnError, Lost, RequestError, UnknownSession
from djinn_zmq.settings import LONGEST, Settings, default_endpoint
from djinn_zmq.wire import messages
from djinn_zmq.wire.attach import RunInfo, Runs
from djinn_zmq.wire.messages import SessionInfo, StatusReply
from djinn_zmq.wire.ops import Op

if TYPE_CHECKING:
    from djinn_zmq.bus.keys import ClientKeys
    from djinn_zmq.client.talk import Session as Conversation

CONNECT_S = 5.0

Path = str | os.PathLike[str]


class Server(Block):
    """A server that answers. Made by `connect`; use it in a `with` block."""

    def __init__(
        self,
        connection: Connection,
        drive: Callable[[Operation[Any]], Any],
        progress: Callable[[messages.Progress], None] | None,
    ) -> None:
        """drive: runs an operation of this client; in asyncio code it gives an awaitable of it."""
        self.connection = connection
        self.drive = drive
        self.progress = progress
        self.welcome: messages.Welcome | None = None
        self.conversations: weakref.WeakSet[Conversation] = weakref.WeakSet()
        self._models: dict[str, Model] = {}

    def _hello(self, timeout_s: float) -> Operation[Self]:
        self.welcome = yield from self.connection.hello(timeout_s)
        return self

    def model(self, name: str) -> Model:
        """A served name, a directory with a model, or a hub id; loaded if it is not yet.

        Opens a session, which ends with this connection or `Model.close`. The same name gives the
        same session. Raises UnknownModel, ModelRefused (with the reason), Lost.
        """
        return self.drive(self._model(checks.model("name", name)))

    def _model(self, name: str) -> Operation[Model]:
        model = self._models.get(name)
        if model is None:
            connection, drive, progress = self.connection, self.drive, self.progress
            make = partial(Session, connection, drive, progress)
            session = yield from opened(connection, name, progress, make)
            model = self._models[name] = Model(self, session, self._forget)
        return model

    def _forget(self, model: Model) -> None:
        self._models = {name: one for name, one in self._models.items() if one is not model}

    def ping(self) -> Any:
        """To the server and back: "serving". Raises Lost where it is gone, also from a connection that shares memory
        with it when another serves in its place: nothing of this client is there."""
        return self.drive(self._ping())

    def _ping(self) -> Operation[str]:
        reply = yield Call(Op.PING, messages.Ping())
        return reply.meta.state

    def status(self) -> StatusReply:
        """Models, engines, sessions and memory, as `djinn ps` shows them."""
        return self.drive(self._status())

    def _status(self) -> Operation[StatusReply]:
        reply = yield Call(Op.STATUS, messages.Status())
        return reply.meta

    def events(self, after: int = 0, *, kinds: str | Sequence[str] = ()) -> Any:
        """What happens, as far as it is yours to know: iterate for events as they come, beginning
        with those that have happened and are still known; `so_far()` lists these and does not wait.

        after: only those behind this number. kinds: only of this one, or of these: "engine", "session", "run",
        "stop", "resume", "evict", "prefetch", "write". Each has .number, .unix_s, .kind, .session,
        .text, .nbytes, .elapsed_ns. Runs, and their stops and resumes, are told while somebody
        listens for them; a debugger's always.
        """
        from djinn_zmq.client.events import Events  # on first use: few clients listen

        return Events(self, kinds, after)

    def sessions(self) -> list[SessionInfo]:
        """All sessions of the server; `.yours` tells your own."""
        return self.drive(self._sessions())

    def _sessions(self) -> Operation[list[SessionInfo]]:
        status = yield from self._status()
        return list(status.sessions)

    def runs(self, session: Any) -> Any:
        """What one of your sessions runs now, whichever program it is of: a list with .request,
        .kind, .state ("queued", "running", "held": by a debugger, "waiting": for its client to
        read), .layer, .step, .batch, .positions, .age_s, .stop.

        session: its number, or one of `sessions()`.
        """
        return self.drive(self._runs(_number_of(session)))

    def _runs(self, session: int) -> Operation[list[RunInfo]]:
        reply = yield Call(Op.RUNS, Runs(), session=session)
        return list(reply.meta.runs)

    def attach(self, session: Any, stop_at: Any = None) -> Any:
        """Attach to a session of yours, of another program say: an `Attached`, for a `with` block.

        session: its number, or one of `sessions()`. stop_at: where what it runs from now on is held,
        in the words of `Model.run`; `Attached.breaks` says it anew. One debugger a session. The
        program's own deadlines (timeout_s) stand still while it is held.
        Raises UnknownSession for one that is not there or not yours (the same user over ipc, the
        same key over tcp), Busy where it has a debugger, LayerError, StopError.
        """
        return self.drive(self._attach(_number_of(session), stop_at))

    def _attach(self, number: int, stop_at: Any) -> Operation[Any]:
        from djinn_zmq.client.attach import Attached  # on first use: few clients are debuggers
        from djinn_zmq.client.talk import Session as Conversation

        breaks_of(stop_at)  # before anything is asked
        target = next((one for one in (yield from self._sessions()) if one.id == number), None)
        if target is None or not target.yours:
            raise UnknownSession(f"session {number:016x} does not exist or is not yours")
        connection, drive, progress = self.connection, self.drive, self.progress
        make = partial(Conversation, connection, drive, progress, static=0)
        session = yield from opened(connection, target.model, progress, make)
        self.conversations.add(session)
        attached = Attached(session, target, stop_at)
        yield from attached._begin()
        return attached

    def stop(self) -> Any:
        """End the server. Only for the user who runs it, over its ipc socket. Returns for how many seconds
        it may still write checkpoints to its state directory."""
        return self.drive(self._stop())

    def _stop(self) -> Operation[float]:
        reply = yield Call(Op.STOP, messages.Stop())
        return reply.meta.within_s

    def close(self) -> Any:
        """End this client's sessions and close the connection. What keeps a session from being ended is raised
        when all the others, and the connection, have been."""
        return self.drive(self._close())

    def _close(self) -> Generator[Any, Any, None]:
        failure: DjinnError | None = None
        try:
            if self.connection.sharing.lease is None:  # else its end of file says it
                endings = [_end(model.session_id) for model in self._models.values()]
                endings += [conversation.end() for conversation in self.conversations]
                for ending in endings:
                    try:
                        yield from ending
                    except UnknownSession:
                        pass  # it has ended already
                    except (Busy, Closed, Lost):
                        break  # the server is gone or busy; it finds out by itself
                    except DjinnError as exc:
                        failure = failure or exc
        finally:
            self._models.clear()
            self.connection.close()
        if failure is not None:
            raise failure

    def __repr__(self) -> str:
        return f"<server at {self.connection.endpoint}>"


def _end(session: int) -> Operation[Any]:
    return (yield Call(Op.CLOSE, messages.Close(), session=session, timeout_s=CLOSE_S))


def _number_of(session: Any) -> int:
    """A session as its number: that, what `Server.sessions` gives, or a session of one's own."""
    number = getattr(session, "id", getattr(session, "session_id", session))
    if checks.is_whole(number) and 0 < number < 2**64:
        return int(number)
    raise RequestError(f"session={checks.shown(session)}: its number, or one of server.sessions()")


def connect(
    endpoint: str | None = None,
    *,
    key: Path | None = None,
    server_key: Path | None = None,
    timeout_s: float = CONNECT_S,
    shared: bool = True,
    lane: bool = True,
    spin_us: int = 0,
    progress: Callable[[messages.Progress], None] | None | bool = True,
) -> Server:
    """Connect to a server.

    endpoint: "ipc://PATH" or "tcp://HOST:PORT"; by default $DJINN_ENDPOINT, else your own server's
    ipc socket.
    key: your key file for a remote server (`djinn keys new NAME`); server_key: the server's .pub
    file, by default server.pub beside *key*.
    shared: use shared memory where the server is on this machine and yours.
    lane: there, also take the lane past the server to the engine.
    spin_us: microseconds for which a request on a lane stays awake before it sleeps; costs a core
    that long, and saves a wake-up.
    progress: called while a model loads; True: a line on stderr if that is a terminal.
    Raises Unreachable where no server answers within *timeout_s* seconds.
    """
    connection = WaitingConnection(
        default_endpoint() if endpoint is None else endpoint,
        keys_of(key, server_key),
        Settings(spin_us=checks.whole("spin_us", spin_us, least=0, most=LONGEST["spin_us"])),
        shared=shared,
        lane=lane,
    )
    try:
        server = Server(connection, connection.drive, reporter(progress))
        return server.drive(server._hello(timeout_s))
    except BaseException:
        connection.close()
        raise


def keys_of(key: Path | None, server_key: Path | None) -> "ClientKeys | None":
    """What a client shows who it is by; None: nothing. Raises RequestError for what is no key."""
    if key is None:
        if server_key is not None:
            raise RequestError("server_key without key: give your own key file, too")
        return None
    from djinn_zmq.bus.keys import client_keys  # on first use: most clients are local

    key = checks.path("key", key)
    return client_keys(key, server_key and checks.path("server_key", server_key))


def reporter(
    progress: Callable[[messages.Progress], None] | None | bool,
) -> Callable[[messages.Progress], None] | None:
    """What is called with progress: the caller's own, a line on a terminal, or nothing."""
    if callable(progress):
        return progress
    if progress is not None and not isinstance(progress, bool):
        raise RequestError(f"progress={checks.shown(progress)}: a function, True or False")
    return _line_on_stderr if progress and sys.stderr.isatty() else None


def _line_on_stderr(progress: messages.Progress) -> None:
    step = f" ({progress.done + 1}/{progress.total})" if progress.total else ""
    sys.stderr.write(f"\r\x1b[Kdjinn: {progress.stage}{step}")
    if progress.total and progress.done + 1 >= progress.total:
        sys.stderr.write("\r\x1b[K")
    sys.stderr.flush()
