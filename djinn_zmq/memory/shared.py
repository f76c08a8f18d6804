"""Sealed anonymous memory and its descriptors.

A memfd has no name and no tracker: it goes with the last process that holds it, also after SIGKILL.
Pages are allocated before anyone maps them (else memory running out is a SIGBUS, later, in somebody
else's copy) and the size is sealed (a peer that truncates is a SIGBUS too).
"""

import errno
import fcntl
import mmap
import os

from djinn_zmq.errors import ArenaFull, ProtocolError
from djinn_zmq.settings import format_bytes

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(nbytes: int, name: str) -> int:
    """A new sealed memfd of *nbytes* with its pages allocated. Returns the descriptor.

    Raises ArenaFull where the system has no memory left for it.
    """
    fd = os.memfd_create(f"djinn-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as exc:
        os.close(fd)
        if exc.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise ArenaFull(f"the system refused {format_bytes(nbytes)} of shared memory") from exc
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def sealed_size(fd: int) -> int:
    """Bytes behind *fd*, which a peer sent. Raises ProtocolError unless its size is sealed."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise ProtocolError("the descriptor is no sealable memory") from exc
    if seals & SEALS != SEALS:
        raise ProtocolError(f"shared memory must be sealed against resizing: its seals are {seals}")
    return os.fstat(fd).st_size


def read_only(fd: int) -> int:
    """A second descriptor of the same memory that cannot be mapped for writing."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def mapped(fd: int, nbytes: int, *, writable: bool) -> mmap.mmap:
    """Map all of *fd*. A writable map is faulted in at once: a first touch costs 1-2 us a page."""
    if writable:
        return mmap.mmap(
            fd,
            nbytes,
            flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
