"""The shared arenas of a server: their numbers, their descriptors, and who is handed which.

Whoever leases the slots of an arena also makes it (allocating its pages takes 0.4 s a GiB, which
the server's one thread must not spend) and shares it here. The server checks the seals, gives it a
number and keeps a descriptor, so the memory outlives the process that made it.
"""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from djinn_zmq.bus import lease as lease_bus
from djinn_zmq.bus.lease import LeaseSocket, close_all
from djinn_zmq.errors import (
    AccessDenied,
    ArenaFull,
    DjinnError,
    Lost,
    ProtocolError,
    RequestError,
)
from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import (
    GRANULE,
    HEADER_ROOM,
    Arena,
    OwnArena,
    Pool,
    mark_retired,
    total_size,
)
from djinn_zmq.server.registry import Peer
from djinn_zmq.settings import Settings, format_bytes
from djinn_zmq.wire import messages
from djinn_zmq.wire.tensors import Slot

# How many come beside a packet to the server; beside others, none.
DESCRIPTORS: dict[type, int] = {messages.Share: 1, messages.Offer: 3}


@dataclass(slots=True, eq=False)
class Shared:
    """An arena as the server keeps it.

    by: the Peer or the engine's index that leases its slots; for the server's own, the owner whose
    uploads it holds.
    """

    fd: int
    nbytes: int
    by: Peer | int | str
    mapped: Arena | None = None


class Arenas:
    def __init__(
        self,
        path: Path,
        settings: Settings,
        on_gone: Callable[[Peer], None],
        on_offer: Callable[[Peer, messages.Offer, list[int]], int],
        may_map: Callable[[str, int], bool] = lambda owner, arena: True,
        on_retired: Callable[[list[int]], None] = lambda arenas: None,
    ) -> None:
        """path: of the lease socket. on_gone: called with a peer whose process is gone. on_offer:
        with a peer's lane and its descriptors, for the lane's number. may_map: has this owner
        something in this arena of an engine's? Engines never mix owners in one. on_retired: with the
        numbers of arenas that their owner gave up and goes on without."""
        self._settings = settings
        self._on_gone = on_gone
        self._on_offer = on_offer
        self._may_map = may_map
        self._on_retired = on_retired
        self._shared: dict[int, Shared] = {}
        self._last = 0
        self._tokens: dict[bytes, Peer] = {}
        self._listener = lease_bus.listen(path)
        self._spare = self._listener.dup()  # a descriptor for who there is none for
        self.path = path
        # One epoll for all clients: the loop's own poll must not grow with their number.
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._connections: dict[int, tuple[LeaseSocket, Peer | None]] = {}
        self._staging: dict[str, Pool] = {}  # by owner: an arena never holds two owners' bytes

    def fileno(self) -> int:
        return self._epoll.fileno()

    # ---- clients

    def invite(self, peer: Peer) -> None:
        """Let *peer* join with its token."""
        self._tokens[peer.token] = peer

    def serve(self) -> None:
        """Answer whatever came on the lease sockets. Never waits."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._connections:  # not found gone meanwhile
                self._serve_client(fd)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # or gone before it was taken
        sock.setblocking(False)
        connection = LeaseSocket(sock)
        if connection.peer_uid() != os.getuid():
            connection.close()
            return
        self._connections[sock.fileno()] = (connection, None)
        self._epoll.register(sock, select.EPOLLIN)

    def _turn_away(self) -> None:
        """Hang up on who waits: the bus serves as well, and of one who waits we would be told without end."""
        self._spare.close()
        with contextlib.suppress(OSError):  # another thread had need of it, or it is gone
            self._spare, _ = self._listener.accept()
            self._spare.shutdown(socket.SHUT_RDWR)

    def _serve_client(self, fd: int) -> None:
        connection, peer = self._connections[fd]
        try:
            packet, fds = connection.receive()
            if peer is None and fds:
                close_all(fds)
                raise ProtocolError("a descriptor from a stranger")
            if isinstance(packet, messages.Join) and peer is None:
                peer = self._join(fd, connection, packet)
                connection.send(messages.Granted(0, ""))
            elif peer is not None:
                self.answer(connection, packet, fds, peer)
            else:
                raise ProtocolError("the first packet of a lease socket must join")
        except BlockingIOError:
            return
        except (DjinnError, OSError):
            if fd not in self._connections:  # it was found gone meanwhile
                return
            self._hang_up(fd)
            if peer is not None:
                peer.lease = None
                self._on_gone(peer)

    def _join(self, fd: int, connection: LeaseSocket, packet: messages.Join) -> Peer:
        peer = self._tokens.pop(packet.token, None)
        if peer is None:
            raise AccessDenied("no peer of the bus has this token")
        self._connections[fd] = (connection, peer)
        peer.lease = connection
        return peer

    def _hang_up(self, fd: int) -> None:
        connection, _ = self._connections.pop(fd)
        self._epoll.unregister(fd)
        connection.close()

    def drop(self, peer: Peer) -> list[int]:
        """Forget *peer*: its token, its lease socket and the arenas it shared, whose numbers it
        returns."""
        self._tokens.pop(peer.token, None)
        if peer.lease is not None:
            self._hang_up(peer.lease.socket.fileno())
            peer.lease = None
        return self.retire(peer)

    # ---- arenas

    def answer(
        self,
        connection: LeaseSocket,
        packet: messages.Lease,
        fds: list[int],
        by: Peer | int,
    ) -> None:
        """Answer one packet of a client or an engine; *fds* came with it and are taken over."""
        # A client may ask and not read; an engine is ours, and waits for nothing else.
        send = connection.send if isinstance(by, Peer) else connection.post
        try:
            if len(fds) != DESCRIPTORS.get(type(packet), 0):
                close_all(fds)
                raise ProtocolError(f"{len(fds)} descriptors beside a {type(packet).__name__}")
            if isinstance(packet, messages.Share):
                send(messages.Granted(self._take(fds[0], by), ""))
            elif isinstance(packet, messages.Offer) and isinstance(by, Peer):
                send(messages.Granted(self._on_offer(by, packet, fds), ""))
            elif isinstance(packet, messages.Offer):
                close_all(fds)
                raise ProtocolError("a lane is a client's to offer")
            elif isinstance(packet, messages.Retire):
                self._give_up(packet.arena, by)
            elif isinstance(packet, messages.Want):
                self._hand_over(send, packet.arena, by)
            else:
                raise ProtocolError(f"{type(packet).__name__} is not for the server")
        except (RequestError, ArenaFull, Lost) as exc:
            send(messages.Refused(exc.code, str(exc)))

    def _take(self, fd: int, by: Peer | int) -> int:
        try:
            nbytes = shared.sealed_size(fd)
            if nbytes < total_size(1):
                raise ProtocolError(f"{nbytes} bytes of shared memory are no arena")
            limit = (
                self._settings.client_arenas if isinstance(by, Peer) else self._settings.host_memory
            )
            already = sum(arena.nbytes for arena in self._shared.values() if arena.by == by)
            count = 1 + sum(arena.by == by for arena in self._shared.values())
            # Tables come on top of what arenas hold: 8 bytes a granule, a header, and rounding. Of the smallest
            # arena too they are not all: of those there would be any number.
            if already + nbytes > limit + limit // 512 + count * (GRANULE + HEADER_ROOM) + GRANULE:
                raise ArenaFull(
                    f"{format_bytes(nbytes)} shared, {format_bytes(max(0, limit - already))} free, "
                    f"limit {format_bytes(limit)}"
                )
        except BaseException:
            os.close(fd)
            raise
        return self._number(Shared(fd, nbytes, by))

    def _number(self, arena: Shared) -> int:
        self._last += 1
        self._shared[self._last] = arena
        return self._last

    def _give_up(self, number: int, by: Peer | int | str) -> None:
        """*by* wants its room for another; nothing happens where it is not its own."""
        if not self._is_of(number, by):
            return
        self._let_go([number])
        if not isinstance(by, int):  # clients who mapped an engine's see its mark
            self._on_retired([number])

    def staging(self, owner: str) -> Pool:
        """Where *owner*'s uploads go."""
        pool = self._staging.get(owner)
        if pool is None:
            limit, nbytes = self._settings.client_arenas, self._settings.arena // 4

            def register(arena: OwnArena) -> int:
                return self._number(Shared(os.dup(arena.fd), arena.nbytes, owner))

            def retire(arena: OwnArena) -> None:
                self._give_up(arena.number, owner)

            pool = self._staging[owner] = Pool(limit, nbytes, register, "staging", retire)
        return pool

    def staged(self) -> int:
        """Bytes in slots of uploads."""
        return sum(pool.used for pool in self._staging.values())

    def end_staging(self, owner: str) -> list[int]:
        """*owner* has no connection any more: let go of its arenas. Returns their numbers."""
        pool = self._staging.pop(owner, None)
        if pool is None:
            return []
        pool.close()
        return self.retire(owner)

    def _hand_over(self, send: Callable[..., None], number: int, by: Peer | int) -> None:
        arena = self._shared.get(number)
        if arena is None:
            raise Lost(f"arena {number} is gone")
        # Only the leasing side writes. An engine that follows a dead one takes over its arenas.
        if by == arena.by and isinstance(by, int):
            send(messages.Granted(number, ""), arena.fd)
            return
        if isinstance(by, Peer) and not isinstance(arena.by, int):
            raise AccessDenied(f"arena {number} is not an engine's")
        if isinstance(by, Peer) and not self._may_map(by.owner, number):
            raise AccessDenied(f"nothing of yours is in arena {number}")
        try:
            fd = shared.read_only(arena.fd)
        except OSError as exc:  # its maker's doing, or ours: not that of who asks
            raise Lost(f"arena {number} cannot be opened: {exc.strerror}") from exc
        try:
            owner = arena.by.owner if isinstance(arena.by, Peer) else arena.by
            send(messages.Granted(number, owner if isinstance(owner, str) else ""), fd)
        finally:
            os.close(fd)

    def view(self, slot: Slot, nbytes: int) -> memoryview:
        """The bytes of a slot, for the server's own reading. `recheck` after copying."""
        return self._mapped(slot).view(slot, nbytes)

    def recheck(self, slot: Slot) -> None:
        self._mapped(slot).check(slot)

    def _mapped(self, slot: Slot) -> Arena:
        arena = self._shared.get(slot.arena)
        if arena is None:
            raise Lost(f"arena {slot.arena} is gone")
        if arena.mapped is None:
            arena.mapped = Arena(slot.arena, os.dup(arena.fd))
        return arena.mapped

    def retire(self, by: Peer | int | str, keep: frozenset[int] = frozenset()) -> list[int]:
        """Let go of the arenas *by* shared, but for those in *keep*. Returns their numbers.

        A live process might still write into them, so they are never handed out again.
        """
        return self._let_go([n for n in self._shared if self._is_of(n, by) and n not in keep])

    def _is_of(self, number: int, by: Peer | int | str) -> bool:
        return number in self._shared and self._shared[number].by == by

    def _let_go(self, numbers: list[int]) -> list[int]:
        for number in numbers:
            arena = self._shared.pop(number)
            if isinstance(arena.by, int):  # clients map it, and keep its pages
                mark_retired(arena.fd)
            if arena.mapped is not None:
                arena.mapped.close()
            os.close(arena.fd)
        return numbers

    def nbytes(self) -> int:
        return sum(arena.nbytes for arena in self._shared.values())

    def close(self) -> None:
        for fd in list(self._connections):
            self._hang_up(fd)
        for pool in self._staging.values():
            pool.close()
        for arena in self._shared.values():
            if arena.mapped is not None:
                arena.mapped.close()
            os.close(arena.fd)
        self._shared.clear()
        self._epoll.close()
        self._listener.close()
        self._spare.close()
        self.path.unlink(missing_ok=True)
