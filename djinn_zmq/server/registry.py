"""Who is connected, whose sessions there are, and what is kept where. The one copy of that truth.

What state a run is in is the engine's to know; whose it is and where its bytes are, is known here.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from djinn_zmq.bus.lease import LeaseSocket
from djinn_zmq.bus.router import Router
from djinn_zmq.errors import Busy, UnknownCheckpoint, UnknownSession
from djinn_zmq.wire import states
from djinn_zmq.wire.messages import ModelInfo, SessionInfo
from djinn_zmq.wire.tensors import Slot, Tensor
from djinn_zmq.wire.tiers import TIERS, Kept, TierInfo

STRANGER = "tcp:"  # what the owner of a connection begins with that is its own owner
PROGRAM_LIMIT = 200  # bytes of a command line


@dataclass(eq=False)
class Peer:
    """One client's connection to the bus."""

    envelope: bytes  # which router (one byte) and its route there: names the peer on the links
    router: Router
    route: bytes
    owner: str  # "uid:1000", "key:alice"; a connection without either is its own owner
    trusted: bool  # a user or a key, not just somebody on the loopback
    uid: int | None
    process: int = 0  # its pid, as the kernel says over ipc; 0: not known
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    lease: LeaseSocket | None = None
    sessions: set[int] = field(default_factory=set)

    @cached_property
    def program(self) -> str:
        """The command line of its process, "" where that cannot be known."""
        if not self.process:
            return ""
        try:
            words = Path(f"/proc/{self.process}/cmdline").read_bytes()
        except OSError:
            return ""
        return words[:PROGRAM_LIMIT].replace(b"\0", b" ").decode(errors="replace").strip()

    @property
    def pid(self) -> int:
        """Its process, as the kernel says, where it shares memory; else 0."""
        return self.lease.peer_pid() if self.lease is not None else 0


@dataclass(slots=True, eq=False)
class KeptRecord:
    """A kept tensor and the token ids its run was made of, enough for another engine to go on."""

    kept: Kept
    ids: Tensor


@dataclass(slots=True, eq=False)
class Session:
    id: int
    owner: str
    model: str
    engine: int
    peer: Peer | None
    state: states.Session = states.Session.OPEN
    kept: dict[int, KeptRecord] = field(default_factory=dict)
    waiting: int = 0
    kv: int = 0  # bytes of keys and values that its engine holds for it
    created_s: float = field(default_factory=time.monotonic)
    closes_s: float = float("inf")  # monotonic; set while KEPT
    info_of_model: ModelInfo | None = None
    ids: Tensor | None = None  # of the last KEEP

    def info(self, asker: Peer) -> SessionInfo:
        return SessionInfo(
            id=self.id,
            owner=self.owner,
            model=self.model,
            state=str(self.state),
            engine=self.engine,
            checkpoints=sum(record.kept.layer >= 0 for record in self.kept.values()),
            nbytes=sum(record.kept.tensor.nbytes for record in self.kept.values()),
            waiting=self.waiting,
            age_s=time.monotonic() - self.created_s,
            yours=self.owner == asker.owner,
            kv=self.kv,
            pid=0 if self.peer is None else self.peer.process,
            program=self.peer.program if self.peer and self.owner == asker.owner else "",
        )


class Registry:
    def __init__(self, sessions_limit: int) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.sessions: dict[int, Session] = {}
        self.due_s = float("inf")  # monotonic: when the next kept session is to be closed
        # Before a session is another peer's. Raises DjinnError where that cannot be told.
        self.on_move: Callable[[Session, Peer], None] = lambda session, peer: None
        self._sessions_limit = sessions_limit

    def open(self, peer: Peer, model: str, engine: int) -> Session:
        """A new session. Raises Busy where its owner has too many."""
        count = sum(session.owner == peer.owner for session in self.sessions.values())
        if count >= self._sessions_limit:
            raise Busy(f"{count} sessions are open: at most {self._sessions_limit} for one owner")
        number = secrets.randbits(63) | 1  # not to be guessed, never 0
        session = Session(number, peer.owner, model, engine, peer)
        self.sessions[number] = session
        peer.sessions.add(number)
        return session

    def owned(self, peer: Peer, number: int) -> Session:
        """The session *number*, if *peer*'s owner has it. The refusal does not tell whether it exists."""
        session = self.sessions.get(number)
        if session is None or session.owner != peer.owner:
            raise UnknownSession(
                f"session {number:016x} does not exist or is not yours: it may have been closed, or have ended "
                "with its connection"
            )
        return session

    def session_of(self, peer: Peer, number: int) -> Session:
        """The same, and it is *peer*'s from now on."""
        session = self.owned(peer, number)
        if session.peer is not peer:
            self._move(session, peer)
        return session

    def _move(self, session: Session, peer: Peer) -> None:
        """The owner speaks from another connection: a client that came back."""
        self.on_move(session, peer)
        if session.peer is not None:
            session.peer.sessions.discard(session.id)
        if session.state is states.Session.KEPT:
            session.state = states.advance(states.SESSION, session.state, "return")
            session.closes_s = float("inf")
            self._plan()
        session.peer = peer
        peer.sessions.add(session.id)

    def keep_open(self, session: Session, grace_s: float) -> None:
        """Its client is gone: wait *grace_s* for it to come back."""
        session.state = states.advance(states.SESSION, session.state, "leave")
        session.peer = None
        session.closes_s = time.monotonic() + grace_s
        self._plan()

    def close(self, session: Session) -> None:
        session.state = states.advance(states.SESSION, session.state, "close")
        del self.sessions[session.id]
        if session.peer is not None:
            session.peer.sessions.discard(session.id)
        self._plan()

    def overdue(self) -> list[Session]:
        now = time.monotonic()
        return [session for session in self.sessions.values() if session.closes_s <= now]

    def _plan(self) -> None:
        closing = (session.closes_s for session in self.sessions.values())
        self.due_s = min(closing, default=float("inf"))

    def kept_of(self, session: Session, number: int) -> KeptRecord:
        """The kept tensor *number* of *session*."""
        record = session.kept.get(number)
        if record is None:
            raise UnknownCheckpoint.numbered(number)
        return record

    def moved(self, kept: Kept) -> Session | None:
        """*kept* is elsewhere now; returns the session it is of, None where nobody keeps it."""
        session = self.sessions.get(kept.session)
        record = session.kept.get(kept.id) if session is not None else None
        if record is None:
            return None
        record.kept = kept
        return session

    def has_in(self, owner: str, arena: int) -> bool:
        """Is anything of *owner*'s kept in *arena*?"""
        return any(
            isinstance(where := record.kept.tensor.where, Slot) and where.arena == arena
            for session in self.sessions.values()
            if session.owner == owner
            for record in session.kept.values()
        )

    def tiers(self, engines: Iterable[int], limits: Callable[[int, str], int]) -> list[TierInfo]:
        """What is in each tier of each engine. limits: of (engine, tier), in bytes."""
        used = {(engine, name): [0, 0] for engine in engines for name in TIERS}
        for engine in engines:
            for _, record in self.kept_by(engine):
                for name in record.kept.tiers:
                    count = used[engine, name]
                    count[0] += record.kept.tensor.nbytes
                    count[1] += record.kept.layer >= 0
        return [
            TierInfo(engine, name, limits(engine, name), nbytes, count)
            for (engine, name), (nbytes, count) in used.items()
        ]

    def kept_by(self, engine: int) -> Iterator[tuple[Session, KeptRecord]]:
        for session in self.sessions.values():
            if session.engine == engine:
                for record in session.kept.values():
                    yield session, record

    def sessions_on(self, engine: int) -> Iterable[Session]:
        return [session for session in self.sessions.values() if session.engine == engine]
