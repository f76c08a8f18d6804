"""The lease socket: AF_UNIX packets with descriptors beside them, between processes of one user.

It hands over arenas, and its end of file is the notice that the other process is gone: the kernel
sends it also for a process that was killed. Clients connect to a path; an engine inherits one end
of a pair. Both speak the same packets.
"""

import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from djinn_zmq.errors import AccessDenied, Lost, ProtocolError, Unreachable, from_wire
from djinn_zmq.memory import shared
from djinn_zmq.wire import messages
from djinn_zmq.wire.codec import decode_lease, encode_lease

Packet = tuple[messages.Lease, list[int]]  # with its descriptors

FDS_LIMIT = 3  # descriptors beside one packet: a lane's
PACKET_LIMIT = 4096
ANSWER_S = 10.0  # a server answers in microseconds; one that does not is stuck or stopped
FD = struct.Struct("i")
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid, as SO_PEERCRED gives them


class LeaseSocket:
    """One end. Sends and receives single packets, with up to three descriptors beside each."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.late: list[Packet] = []  # what came while `ask` waited for its answer
        self.unsent: deque[Packet] = deque()  # what was posted and found no room
        self.on_full: Callable[[], None] = lambda: None  # called when there is some
        self._given_up = 0  # questions whose answers nobody waits for
        self._other = "the other end of the lease socket"  # as an error calls it

    @classmethod
    def connect(cls, path: str | os.PathLike[str], token: bytes) -> "LeaseSocket":
        """Connect to a server's lease socket as the peer that *token* shows.

        Raises Unreachable where nobody listens, AccessDenied where the server is another user's.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(os.fspath(path))
            lease = cls(sock)
            if lease.peer_uid() != os.getuid():
                raise AccessDenied(f"{path} belongs to uid {lease.peer_uid()}")
            lease._other = f"the server at {path}"
            lease.ask(messages.Join(token))
        except OSError as exc:
            sock.close()
            raise Unreachable(f"no lease socket at {path}: {exc.strerror or exc}") from exc
        except BaseException:
            sock.close()
            raise
        return lease

    def peer_uid(self) -> int:
        return self._credentials()[1]

    def peer_pid(self) -> int:
        return self._credentials()[0]

    def _credentials(self) -> tuple[int, ...]:
        data = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        return CREDENTIALS.unpack(data)

    def send(self, packet: messages.Lease, *fds: int) -> None:
        """Raises Lost where the other end is gone, BlockingIOError where its queue is full."""
        try:
            socket.send_fds(self.socket, [encode_lease(packet)], fds)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise Lost(f"{self._other} is gone") from exc
        except TimeoutError as exc:
            raise self._gave_up() from exc

    def post(self, packet: messages.Lease, *fds: int) -> None:
        """Send what the other end must not miss, news or an answer: now, or by `flush` when it has read
        others. Never waits. Raises Lost."""
        if not self.unsent:
            with contextlib.suppress(BlockingIOError):
                self.send(packet, *fds)
                return
        self.unsent.append((packet, shared.duplicates(fds)))
        self.on_full()

    def flush(self) -> bool:
        """Send what was posted, as far as there is room. True where nothing is left of it."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                packet, fds = self.unsent[0]
                self.send(packet, *fds)
                self.unsent.popleft()
                close_all(fds)
        return not self.unsent

    def receive(self) -> Packet:
        """The next packet and its descriptors, which are the receiver's to close.

        Raises Lost at the end of file, BlockingIOError where nothing has come.
        """
        try:
            data, beside = self._take()
        except ConnectionResetError:
            # It went without having read everything: said once, before what it still said itself.
            data, beside = self._take()
        except TimeoutError as exc:
            raise self._gave_up() from exc
        fds = _descriptors(beside)
        for spare in fds[FDS_LIMIT:] if data else fds:  # an empty packet may carry some too
            os.close(spare)
        if not data:
            raise Lost(f"{self._other} is gone")
        fds = fds[:FDS_LIMIT]
        try:
            return decode_lease(data), fds
        except ProtocolError:
            close_all(fds)
            raise

    def _take(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        """A packet as it came, and what came beside it."""
        # Not recv_fds: before Python 3.12 it drops the flag, and an engine started later would
        # inherit what has come. The kernel closes those of a peer's descriptors beyond 16.
        return self.socket.recvmsg(
            PACKET_LIMIT, socket.CMSG_LEN(16 * FD.size), socket.MSG_CMSG_CLOEXEC
        )[:2]

    def hang_up(self) -> None:
        """The end, on both sides: each hears of it as of the other's death."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _gave_up(self) -> Lost:
        self.hang_up()  # a late answer would pass for that to the next question
        return Lost(f"the lease socket did not answer in {self.socket.gettimeout():g} s")

    def ask(self, packet: messages.Lease, *fds: int) -> tuple[messages.Granted, int | None]:
        """Send, wait for the answer; what was granted, and a descriptor. Needs a blocking socket.

        Raises what the other end refused with.
        """
        self.send(packet, *fds)
        self._given_up += 1  # as by a KeyboardInterrupt from here on
        while True:
            answer, answer_fds = self.receive()
            answers = isinstance(answer, (messages.Granted, messages.Refused))
            if answers and self._given_up > 1:  # to one before
                self._given_up -= 1
                close_all(answer_fds)
                continue
            self._given_up -= answers
            if isinstance(answer, messages.Granted):
                close_all(answer_fds[1:])
                return answer, answer_fds[0] if answer_fds else None
            if isinstance(answer, messages.Refused):
                close_all(answer_fds)
                raise from_wire(answer.code, answer.text)
            self.late.append((answer, answer_fds))  # news that crossed the question

    def take_late(self) -> list[Packet]:
        """What is in `late`, which is empty then."""
        late, self.late = self.late, []
        return late

    def news(self) -> list[Packet]:
        """What has come unasked; never waits. Raises Lost at the end of file."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while poll.poll(0):
            self.late.append(self.receive())
        return self.take_late()

    def close(self) -> None:
        for _, fds in (*self.take_late(), *self.unsent):
            close_all(fds)
        self.unsent.clear()
        self.socket.close()


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _descriptors(beside: list[tuple[int, int, bytes]]) -> list[int]:
    """What the ancillary data of a packet brought; all of it is the receiver's to close."""
    fds: list[int] = []
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(data) - len(data) % FD.size  # the last one may have been cut
            fds += [fd for (fd,) in FD.iter_unpack(data[:whole])]
    return fds


def listen(path: Path) -> socket.socket:
    """A listening lease socket at *path*, for this user alone. The caller holds the path's lock."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    sock.listen(128)
    sock.setblocking(False)
    return sock


def pair() -> tuple[LeaseSocket, socket.socket]:
    """The server's end (not blocking) and the end an engine inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return LeaseSocket(ours), theirs
