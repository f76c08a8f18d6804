"""The server's loop: one thread, one poll over the bus, the lease sockets and the engines.

ROUTER ipc, ROUTER tcp   clients' requests    header read, owner checked, passed on or answered
lease sockets            descriptors          their end of file is a client's death (`arenas.py`)
engine links             replies, notices     passed back by the envelope in front (`links.py`)
engine lease sockets     descriptors          their end of file is an engine's death (the same)
ZAP                      new tcp clients      allowed keys only
"""

import contextlib
import fcntl
import itertools
import logging
import os
import signal
import socket as pysocket
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from djinn_zmq.bus.keys import Admission, ServerKeys
from djinn_zmq.bus.limits import has_message
from djinn_zmq.bus.poll import Poll
from djinn_zmq.bus.router import Router
from djinn_zmq.errors import (
    AddressInUse,
    Busy,
    Closed,
    DjinnError,
    Lost,
    ProtocolError,
    RunError,
    UnknownSession,
)
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.catalog import Catalog
from djinn_zmq.server.dropped import Dropped
from djinn_zmq.server.engines import READY, Engine
from djinn_zmq.server.fleet import Fleet
from djinn_zmq.server.journal import Journal
from djinn_zmq.server.knocks import Knocks
from djinn_zmq.server.lanes import Lanes
from djinn_zmq.server.links import Links
from djinn_zmq.server.news import News
from djinn_zmq.server.registry import STRANGER, Peer, Registry, Session
from djinn_zmq.server.requests import Requests
from djinn_zmq.server.returned import Returned
from djinn_zmq.settings import Settings, format_bytes, private_dir
from djinn_zmq.wire import codec
from djinn_zmq.wire.codec import OF_ANSWERS, Header
from djinn_zmq.wire.messages import Flag, Offer, Pong, Progress
from djinn_zmq.wire.ops import TO_ENGINE, Op

_log = logging.getLogger(__name__)

NEVER = float("inf")
# Answered by what the engines have told of what is kept, and where.
OF_KEPT = frozenset({Op.READ, Op.RELEASE, Op.CLOSE, Op.WHERE, Op.STATUS, Op.EVENTS, Op.CLAIM})
PING, MORE, CANCEL, ONE_WAY = int(Op.PING), int(Op.MORE), int(Op.CANCEL), int(Flag.ONE_WAY)
LINGER_MS = 200  # for the last answers
IPC, TCP = b"i", b"t"  # first byte of an envelope: which router the route belongs to
TO_SERVER = frozenset(
    {Op.HELLO, Op.PING, Op.STATUS, Op.OPEN, Op.CLOSE, Op.READ, Op.RELEASE, Op.UPLOAD, Op.CHUNK}
) | {Op.STOP, Op.WHERE, Op.CLAIM, Op.EVENTS}

Buffers = Sequence[memoryview]


class Server:
    def __init__(
        self,
        path: Path,
        settings: Settings,
        *,
        devices: Sequence[str],
        dtype: str = "auto",
        models: tuple[str, ...] = (),
        shapes: tuple[str, ...] = (),
        tcp: str | None = None,
        keys: ServerKeys | None = None,
        events_port: int = 0,
    ) -> None:
        """Bind everything; start nothing yet.

        path: of the ipc socket, in a directory of this user's alone. tcp: endpoint to bind too.
        events_port: beside it, for events; 0: any that is free.
        Raises AddressInUse where a server stands on either, and what a bad model name raises.
        """
        self.settings = settings
        self.path = path
        self.catalog = Catalog(models, shapes)
        self.journal = Journal()
        self.returned = Returned(settings.state)
        private_dir(path.parent)
        self._lock = _locked(path)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_read, self._wake_write = pysocket.socketpair()
        self._stops = 0  # how often it was told to
        self._knocks = Knocks()
        self._dropped = Dropped()
        self._strangers = itertools.count(1)
        self._admission = Admission(self._context, keys) if keys is not None else None
        self.registry = Registry(settings.sessions_limit)
        self._routers: dict[bytes, Router] = {}
        self.news = News(self._context, settings, self.journal, self._on_runs_wanted)
        try:
            self._bind(IPC, f"ipc://{path}", None)
            self.news.bind_ipc(IPC, path)
            if tcp is not None:
                self._bind(TCP, tcp, keys)
                self.news.bind_tcp(TCP, tcp, events_port, keys)
        except BaseException:
            self._close_bus()
            raise
        lease_path = path.with_name(f"{path.name}.lease")
        self.arenas = Arenas(
            lease_path,
            settings,
            self._on_gone,
            self._on_offer,
            self._may_map,
            lambda arenas: self.fleet.retire(arenas),
        )
        self.fleet = Fleet(
            devices,
            dtype,
            settings,
            self.registry,
            self.arenas,
            self.journal,
            self.returned,
            self._reply,
        )
        self.lanes = Lanes(self.registry, self.fleet.engines)
        self._poll = Poll(settings.spin_us)
        self.links = Links(
            self._poll,
            self.registry,
            self.fleet,
            self.lanes,
            self.arenas,
            self._reply,
            self._on_gone,
        )
        self.fleet.on_start = self.links.watch
        self.requests = Requests(
            self.registry,
            self.fleet,
            self.arenas,
            self.catalog,
            settings,
            self.endpoints,
            self.stop,
            self._close_session,
            self.journal,
            self.news,
            self.returned,
        )
        self._asked: Engine | None = None  # the engine that the last request went to
        self._poll.watch(self._wake_read, self._on_wake)
        self._poll.watch(self.arenas, self.arenas.serve)
        for tag, router in self._routers.items():
            self._poll.watch_used(router, self._on_bus, tag, router)
            monitor = router.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poll.watch(monitor, self._on_disconnect, monitor, tag, router)
        self.news.watch(self._poll)
        if self._admission is not None:
            self._poll.watch(self._admission.socket, self._admission.answer)

    def _bind(self, tag: bytes, endpoint: str, keys: ServerKeys | None) -> None:
        router = Router(self._context, self.settings, keys)
        self._routers[tag] = router
        router.bind(endpoint)

    def endpoints(self) -> tuple[str, ...]:
        return tuple(end for router in self._routers.values() for end in router.endpoints)

    # ---- the loop

    def serve(self) -> None:
        """Start the engines and answer until `stop`."""
        for engine in self.fleet.engines:
            engine.start()
            self.links.watch(engine)
        for model in self.catalog.at_start:
            self.fleet.load(*self.catalog.resolve(model, trusted=True))
        while not self._stops:
            if self.registry.due_s == self._knocks.due_s == self._dropped.due_s == NEVER:
                self._poll.turn(None)
                continue
            due_s = min(self.registry.due_s, self._knocks.due_s, self._dropped.due_s)
            self._poll.turn(max(0.0, due_s - time.monotonic() + 0.001))
            if time.monotonic() >= due_s:
                self._do_what_is_due()
        if self.settings.disk:
            self._shelve()

    def _shelve(self) -> None:
        """Have what is kept written, for a time, or until it is said once more to stop."""
        shelving = self.fleet.shelving
        self.links.hear_all()  # of what is kept, which clients with a lane may know before us
        shelving.begin()
        until_s = time.monotonic() + self.settings.stop_s
        while self._stops < 2 and shelving.waiting and (left_s := until_s - time.monotonic()) > 0:
            self._poll.turn(left_s)
        shelving.name()

    def stop(self) -> None:
        """End `serve`, for the second time at once. May be called from a signal handler."""
        self._stops += 1
        if self._stops <= 2:  # one more may come when the sockets are closed already
            with contextlib.suppress(OSError):
                self._wake_write.send(b"\0")

    def stop_on_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.stop())

    def _on_wake(self) -> None:
        self._wake_read.recv(64)

    def _do_what_is_due(self) -> None:
        for tag in self._knocks.take_due():
            self._knock(tag)
        self._dropped.tell()
        for session in self.registry.overdue():
            self._close_session(session)
            self._end_staging(session.owner)

    # ---- the bus

    def _on_bus(self, tag: bytes, router: Router) -> bool:
        if self._poll.stays_awake and self._asked is not None:
            self._asked.wake()
        incoming = router.receive()
        if incoming is None:
            return False
        route, frame, buffers = incoming
        peer = self.registry.peers.get(tag + route)
        if peer is None:
            peer = self._meet(tag, route, router)
        self._on_request(peer, frame, buffers)
        return True

    def _meet(self, tag: bytes, route: bytes, router: Router) -> Peer:
        address, user = router.identity(route) or ("", "")
        uid, process = None, 0
        if user:
            owner = f"key:{user}"
        elif tag == IPC:
            # libzmq appends the kernel's word on the peer: "localhost:UID:GID:PID"
            uid, _, process = map(int, address.split(":")[-3:])
            owner = f"uid:{uid}"
        else:  # anybody on this machine: each connection is a stranger to the others
            # Not by its route: who comes later could choose the same one.
            owner = f"{STRANGER}{next(self._strangers)}"
        envelope = tag + route
        peer = Peer(envelope, router, route, owner, bool(user) or uid is not None, uid, process)
        self.registry.peers[envelope] = peer
        return peer

    def _on_request(self, peer: Peer, frame: bytes, buffers: Buffers | None) -> None:
        header = codec.NOBODYS
        try:
            header = codec.peek(frame)
            op = header.op
            if buffers is None:
                raise ProtocolError(f"a message may have {codec.BUFFERS_LIMIT} buffers")
            if header.flags & OF_ANSWERS:
                raise ProtocolError("a reply nobody asked for")
            if self._stops:
                raise Closed("the server stops")
            if op in TO_ENGINE or (op == PING and header.session):
                self._forward(peer, header, frame, buffers)
            elif op in TO_SERVER:
                self._answer(peer, header, frame, buffers)
            else:
                raise ProtocolError(f"op {op} is not a client's")
        except Exception as exc:  # noqa: BLE001  one client's request must not end the server
            if not isinstance(exc, DjinnError):
                _log.exception("a request failed")
                exc = RunError(f"the server failed: {type(exc).__name__}: {exc}")
            # A piece goes one way: its upload's request is what is answered, once.
            if header.op == Op.CHUNK:
                awaited = self.requests.end_upload(peer, header.request)
            else:
                awaited = not header.flags & Flag.ONE_WAY
            if awaited:
                self._reply(peer.envelope, codec.failure(header, exc), ())

    def _forward(self, peer: Peer, header: Header, frame: bytes, buffers: Buffers) -> None:
        if len(frame) > self.settings.meta_limit:
            raise ProtocolError(f"a meta of {len(frame)} bytes is too long")
        number = header.session
        session = self.registry.sessions.get(number)
        if session is None or session.peer is not peer:
            # To look at what a session runs is not to take it over.
            look = header.op == Op.RUNS
            session = (self.registry.owned if look else self.registry.session_of)(peer, number)
        engine = self._asked = self.fleet.engines[session.engine]
        if header.op == MORE:  # never answered, so never owed
            if not header.flags & ONE_WAY:
                raise ProtocolError("MORE is not answered: it is sent one way")
            engine.pass_on(peer.envelope, frame, buffers)
            return
        if header.flags & ONE_WAY:
            raise ProtocolError(f"{Op(header.op).name} is answered: it is not sent one way")
        again = (number, header.request) in engine.owed  # one answer comes, to all askings
        limit = self.settings.queue_limit
        # As many again, to cancel what waits.
        if session.waiting >= limit and not (
            again or (header.op == CANCEL and session.waiting < 2 * limit)
        ):
            raise Busy(f"{session.waiting} requests of this session wait: take an answer first")
        if header.op == PING and not engine.owed and engine.link is not None:
            # It answers before we could fall asleep and wake up.
            self._poll.expect(engine.link.lane)
        engine.forward(peer.envelope, header, frame, buffers)
        session.waiting += not again
        if header.credit and engine.state is not READY:
            progress = Progress(engine.detail or f"engine {engine.index} is {engine.state}", 0, 0)
            frame = codec.encode(
                header.op, progress, flags=Flag.PROGRESS, request=header.request, session=number
            )
            self._reply(peer.envelope, frame, ())

    def _answer(self, peer: Peer, header: Header, frame: bytes, buffers: Buffers) -> None:
        message = codec.decode(frame, buffers, header)
        if header.op in OF_KEPT and peer.lease is not None:
            self.links.hear_all()
        answer = self.requests.answer(peer, header, message.meta, buffers)
        if answer is None or header.flags & Flag.ONE_WAY and header.op != Op.CHUNK:
            return
        meta, out = answer
        op = Op.UPLOAD if header.op == Op.CHUNK else header.op
        frame = codec.encode(
            op,
            meta,
            flags=Flag.REPLY,
            request=header.request,
            session=header.session,
            buffers=len(out),
        )
        if len(frame) > self.settings.frame_limit:  # libzmq would end its connection
            limit = format_bytes(self.settings.frame_limit)
            raise RunError(
                f"an answer of {format_bytes(len(frame))}: at most {limit} fit a message"
            )
        self._reply(peer.envelope, frame, out)

    def _may_map(self, owner: str, arena: int) -> bool:
        """Has *owner* something in this arena of an engine's?"""
        if not self.registry.has_in(owner, arena):
            self.links.hear_all()
        return self.registry.has_in(owner, arena)

    def _on_offer(self, peer: Peer, offer: Offer, fds: list[int]) -> int:
        return self.lanes.offer(peer, offer, fds)

    def _reply(self, envelope: bytes, frame: bytes, buffers: Sequence[bytes | memoryview]) -> None:
        peer = self.registry.peers.get(envelope)
        if peer is None:
            return
        try:
            peer.router.send(peer.route, frame, buffers)
        except (Lost, Busy) as exc:
            if isinstance(exc, Busy):
                _log.warning("%s does not read its answers: dropped", peer.owner)
                if peer.lease is None:  # to others the end of that says it
                    self._dropped.add(peer)
            self._on_gone(peer)

    # ---- the end of a client

    def _on_disconnect(self, monitor: zmq.Socket[bytes], tag: bytes, router: Router) -> None:
        """Some connection ended; libzmq does not say whose."""
        while has_message(monitor):
            monitor.recv_multipart()
        router.doubt()
        self._knocks.plan(tag)

    def _knock(self, tag: bytes) -> None:
        """Those peers of a router that are gone are found out by a message to each."""
        frame = codec.encode(Op.PING, Pong("knock"), flags=Flag.REPLY)
        for envelope, peer in list(self.registry.peers.items()):
            if envelope[:1] == tag and peer.lease is None:
                self._reply(envelope, frame, ())

    def _on_gone(self, peer: Peer) -> None:
        """*peer*'s process is gone, or as good as."""
        if self.registry.peers.pop(peer.envelope, None) is None:
            return
        peer.router.forget(peer.route)
        self.fleet.forget_openings(peer)
        self.requests.forget_peer(peer)
        self.lanes.end_of_peer(peer)
        self.fleet.retire(self.arenas.drop(peer))
        # What a stop has found is kept, whoever ends meanwhile.
        for number in () if self._stops else tuple(peer.sessions):
            session = self.registry.sessions[number]
            if peer.uid is None and peer.trusted:
                self.registry.keep_open(session, self.settings.grace_s)
                self.fleet.let_go(session)
            else:
                self._close_session(session)
        self._end_staging(peer.owner)

    def _end_staging(self, owner: str) -> None:
        """Where the last connection and session of *owner* is gone: so is what it uploaded."""
        peers = any(peer.owner == owner for peer in self.registry.peers.values())
        sessions = any(one.owner == owner for one in self.registry.sessions.values())
        if not peers and not sessions:
            self.fleet.retire(self.arenas.end_staging(owner))
            if owner.startswith(STRANGER):
                self.news.forget(owner)

    def _close_session(self, session: Session) -> None:
        self.fleet.close(session)
        closed = UnknownSession(f"session {session.id:016x} was closed before all of it had come")
        for envelope, header in self.requests.forget_uploads({session.id}):
            self._reply(envelope, codec.failure(header, closed), ())

    # ---- the end

    def close(self) -> None:
        """Answer what is owed, end the engines, remove the sockets."""
        why = Closed("the server stops")
        for engine in self.fleet.engines:
            for envelope, header in engine.owed.values():
                self._reply(envelope, codec.failure(header, why), ())
        for envelope, header in self.requests.forget_uploads(self.registry.sessions):
            self._reply(envelope, codec.failure(header, why), ())
        self.fleet.refuse_openings(why)
        self.fleet.stop()
        self.returned.close()
        self.arenas.close()
        self._close_bus()
        self._poll.close()

    def _on_runs_wanted(self, wanted: bool) -> None:
        self.fleet.tell_of_runs(wanted)

    def _close_bus(self) -> None:
        self.news.close()
        for router in self._routers.values():
            router.socket.disable_monitor()
            router.close(LINGER_MS)
        if self._admission is not None:
            self._admission.close()
        self._context.destroy(linger=LINGER_MS)
        self._wake_read.close()
        self._wake_write.close()
        _unlock(self.path, self._lock)


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locked(path: Path) -> int:
    """Hold the lock beside *path*; libzmq would take over a living server's socket without a word.

    Raises AddressInUse where a server holds it.
    """
    lock = _lock_path(path)
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise AddressInUse(
                f"a server already serves {path}: stop it with 'djinn stop', "
                "or choose another socket with --ipc"
            ) from exc
        try:
            if os.fstat(fd).st_ino == lock.stat().st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # its last holder removed the file between our open and our lock


def _unlock(path: Path, fd: int) -> None:
    _lock_path(path).unlink(missing_ok=True)
    os.close(fd)
