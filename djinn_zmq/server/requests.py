"""What the server answers itself, without an engine: one method an op."""

import os
import time
from collections.abc import Callable, Container, Sequence

import msgspec

from djinn_zmq.errors import AccessDenied, ProtocolError, UnknownCheckpoint
from djinn_zmq.server import bulk
from djinn_zmq.server.arenas import Arenas
from djinn_zmq.server.bulk import Arriving
from djinn_zmq.server.catalog import Catalog
from djinn_zmq.server.engines import UP
from djinn_zmq.server.fleet import Fleet
from djinn_zmq.server.journal import Journal
from djinn_zmq.server.news import News
from djinn_zmq.server.registry import Peer, Registry, Session
from djinn_zmq.server.returned import Returned
from djinn_zmq.settings import Settings
from djinn_zmq.version import __version__
from djinn_zmq.wire import messages
from djinn_zmq.wire.codec import Header
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Tensor
from djinn_zmq.wire.tiers import (
    Claim,
    ClaimReply,
    Events,
    EventsReply,
    TierInfo,
    Where,
    WhereReply,
)

EVENTS_AT_ONCE = 1000
UPLOADS_LIMIT = 16  # under way at once from one peer

Answer = tuple[msgspec.Struct, Sequence[bytes | memoryview]]
DONE: Answer = (messages.Done(), ())


class Requests:
    def __init__(
        self,
        registry: Registry,
        fleet: Fleet,
        arenas: Arenas,
        catalog: Catalog,
        settings: Settings,
        endpoints: Callable[[], tuple[str, ...]],
        stop: Callable[[], None],
        close_session: Callable[[Session], None],
        journal: Journal,
        news: News,
        returned: Returned,
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._arenas = arenas
        self._catalog = catalog
        self._settings = settings
        self._endpoints = endpoints
        self._stop = stop
        self._close_session = close_session
        self._journal = journal
        self._news = news
        self._returned = returned
        self._started_s = time.monotonic()
        self._arriving: dict[tuple[bytes, int], Arriving] = {}
        self._uploads: dict[int, tuple[int, Tensor]] = {}  # id → (session, uint8 (nbytes,))
        self._last_upload = 0
        self._answers = {
            Op.HELLO: self._hello,
            Op.PING: self._ping,
            Op.STATUS: self._status,
            Op.OPEN: self._open,
            Op.CLOSE: self._close,
            Op.READ: self._read,
            Op.RELEASE: self._release,
            Op.UPLOAD: self._upload,
            Op.CHUNK: self._chunk,
            Op.STOP: self._stop_server,
            Op.WHERE: self._where,
            Op.CLAIM: self._claim,
            Op.EVENTS: self._events,
        }

    def answer(
        self, peer: Peer, header: Header, meta: msgspec.Struct, buffers: Sequence[memoryview]
    ) -> Answer | None:
        """The reply to a request, or None where it is still to come. Raises DjinnError to refuse."""
        return self._answers[header.op](peer, header, meta, buffers)

    def _hello(self, peer: Peer, header: Header, meta: messages.Hello, _: object) -> Answer:
        same_user = peer.uid == os.getuid() and peer.lease is None
        if same_user:
            self._arenas.invite(peer)
        return (
            messages.Welcome(
                version=__version__,
                pid=os.getpid(),
                lease_path=str(self._arenas.path) if same_user else "",
                token=peer.token if same_user else b"",
                models=self._catalog.names,
                frame_limit=self._settings.frame_limit,
            ),
            (),
        )

    def _ping(self, peer: Peer, header: Header, meta: messages.Ping, _: object) -> Answer:
        return messages.Pong("serving"), ()

    def _status(self, peer: Peer, header: Header, meta: messages.Status, _: object) -> Answer:
        loaded = {
            model.name: model for engine in self._fleet.engines for model in engine.models.values()
        }
        kept = [
            record
            for session in self._registry.sessions.values()
            for record in session.kept.values()
        ]
        return (
            messages.StatusReply(
                version=__version__,
                pid=os.getpid(),
                uptime_s=time.monotonic() - self._started_s,
                endpoints=self._endpoints(),
                names=self._catalog.names,
                models=tuple(loaded.values()),
                engines=tuple(engine.info() for engine in self._fleet.engines),
                sessions=tuple(session.info(peer) for session in self._registry.sessions.values()),
                memory=messages.MemoryInfo(
                    limit=self._settings.host_memory,
                    arenas=self._arenas.nbytes(),
                    used=sum(
                        record.kept.tensor.nbytes for record in kept if "host" in record.kept.tiers
                    )
                    + self._arenas.staged(),
                    checkpoints=sum(record.kept.layer >= 0 for record in kept),
                    tiers=tuple(self._tiers()),
                    unclaimed=len(self._returned),
                    unclaimed_nbytes=self._returned.nbytes,
                ),
            ),
            (),
        )

    def _tiers(self) -> list[TierInfo]:
        engines = self._fleet.engines
        numbers = [engine.index for engine in engines]
        return self._registry.tiers(numbers, lambda index, tier: engines[index].limit(tier))

    def _open(self, peer: Peer, header: Header, meta: messages.Open, _: object) -> None:
        name, source = self._catalog.resolve(meta.model, trusted=peer.trusted)
        self._fleet.open(peer, header, name, source)

    def _close(self, peer: Peer, header: Header, meta: messages.Close, _: object) -> Answer:
        self._close_session(self._registry.session_of(peer, header.session))
        return DONE

    def _read(self, peer: Peer, header: Header, meta: messages.Read, _: object) -> Answer:
        record = self._registry.kept_of(self._registry.session_of(peer, header.session), meta.id)
        return bulk.read(record, meta, self._arenas, self._settings.state)

    def _where(self, peer: Peer, header: Header, meta: Where, _: object) -> Answer:
        session = self._registry.session_of(peer, header.session)
        found = [self._registry.kept_of(session, number).kept for number in meta.ids]
        return WhereReply(tuple(found)), ()

    def _claim(self, peer: Peer, header: Header, meta: Claim, _: object) -> Answer:
        session = self._registry.session_of(peer, header.session)
        info = session.info_of_model
        assert info is not None
        if not meta.ids:
            return ClaimReply(self._returned.of(session.owner, info), ()), ()
        records = self._returned.claim(meta.ids, session, info)
        self._fleet.adopt(session, records)
        kept = tuple(record.kept for record in records)
        return ClaimReply(kept, tuple(record.ids for record in records)), ()

    def _events(self, peer: Peer, header: Header, meta: Events, _: object) -> Answer:
        events = self._journal.after(meta.after, peer.owner, EVENTS_AT_ONCE)
        where = self._news.where(peer.envelope[:1])
        return EventsReply(events, where, self._news.scope(peer.owner)), ()

    def _release(self, peer: Peer, header: Header, meta: messages.Release, _: object) -> Answer:
        session = self._registry.session_of(peer, header.session)
        unknown = [
            number
            for number in meta.ids
            if number not in session.kept and self._uploads.get(number, (0,))[0] != session.id
        ]
        # What a client's garbage collection finds may be gone already, with an engine for example.
        if unknown and not header.flags & Flag.ONE_WAY:
            raise UnknownCheckpoint.numbered(unknown[0])
        kept = []
        for number in dict.fromkeys(meta.ids):
            if number in session.kept:
                del session.kept[number]
                kept.append(number)
            elif number not in unknown:
                _, tensor = self._uploads.pop(number)
                self._arenas.staging(session.owner).give_back(tensor.where)
        engine = self._fleet.engines[session.engine]
        if kept:
            engine.tell(Op.DROP, messages.Drop(tuple(kept)), session=session.id)
        # Holds and branches: the engine knows them, and one that is still to come up has none. They may also be
        # anything, so where the engine does not read they are not told: then they end with their session.
        if unknown and engine.state in UP:
            engine.tell(Op.DROP, messages.Drop(tuple(unknown)), session=session.id, asked=True)
        return DONE

    # ---- uploads

    def _upload(self, peer: Peer, header: Header, meta: messages.Upload, _: object) -> None:
        self._registry.session_of(peer, header.session)
        under_way = sum(envelope == peer.envelope for envelope, _ in self._arriving)
        if under_way >= UPLOADS_LIMIT:
            raise ProtocolError(f"{under_way} uploads are under way: at most {UPLOADS_LIMIT}")
        key = (peer.envelope, header.request)
        if key in self._arriving:
            raise ProtocolError(f"request {header.request} is an upload already")
        self._arriving[key] = bulk.begin(
            header, meta, self._arenas.staging(peer.owner), self._settings
        )

    def _chunk(
        self, peer: Peer, header: Header, meta: messages.Chunk, buffers: list[memoryview]
    ) -> Answer | None:
        key = (peer.envelope, header.request)
        arriving = self._arriving.get(key)
        if arriving is None:
            return None  # its upload was refused, and that has been answered
        if not arriving.take(meta, buffers):
            return None
        self._arriving.pop(key)
        self._last_upload += 1
        number = -self._last_upload & 0x7FFF_FFFF_FFFF_FFFF  # never a checkpoint's number
        tensor = Tensor("uint8", (arriving.nbytes,), arriving.lease.slot)
        self._uploads[number] = (arriving.header.session, tensor)
        return messages.Uploaded(number, tensor), ()

    def end_upload(self, peer: Peer, request: int) -> bool:
        """A piece was refused: nothing comes of its upload. False where none is under way."""
        arriving = self._arriving.pop((peer.envelope, request), None)
        if arriving is None:
            return False
        self._arenas.staging(peer.owner).give_back(arriving.lease.slot)
        return True

    def forget_peer(self, peer: Peer) -> None:
        """Drop what *peer* was still sending."""
        for envelope, request in list(self._arriving):
            if envelope == peer.envelope:
                self.end_upload(peer, request)

    def forget_uploads(self, sessions: Container[int]) -> list[tuple[bytes, Header]]:
        """The slots of these sessions are reclaimed: drop the numbers too. Returns whom to answer, and what: those
        that were under way."""
        for number in [n for n, (owner, _) in self._uploads.items() if owner in sessions]:
            del self._uploads[number]
        keys = [key for key, one in self._arriving.items() if one.header.session in sessions]
        return [(key[0], self._arriving.pop(key).header) for key in keys]

    def _stop_server(self, peer: Peer, header: Header, meta: messages.Stop, _: object) -> Answer:
        if peer.uid != os.getuid():
            raise AccessDenied("only the user who runs the server may stop it, over its ipc socket")
        self._stop()
        return messages.Stopping(self._settings.stop_s if self._settings.disk else 0.0), ()
