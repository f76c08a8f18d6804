"""Sealed anonymous memory and its descriptors.

A memfd has no name and no tracker: it goes with the last process that holds it, also after SIGKILL.
Pages are allocated before anyone maps them (else memory running out is a SIGBUS, later, in somebody
else's copy) and the size is sealed (a peer that truncates is a SIGBUS too).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path

from djinn_zmq.errors import ArenaFull, ProtocolError
from djinn_zmq.settings import format_bytes

MADV_POPULATE_WRITE = 23
AT_ONCE = 4 << 20  # bytes
_libc = ctypes.CDLL(None)  # its calls give up the GIL

CGROUP = Path("/sys/fs/cgroup")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(nbytes: int, name: str) -> int:
    """A new sealed memfd of *nbytes* with its pages allocated. Returns the descriptor.

    Raises ArenaFull where the system has no memory, or this process no descriptor, left for it.
    """
    try:
        # Asked beforehand: the kernel would sooner kill some process than refuse pages to a memfd.
        free = available()
        if nbytes > free:
            raise ArenaFull(
                f"{format_bytes(nbytes)} of shared memory asked, the system has {format_bytes(free)} free"
            )
        fd = os.memfd_create(f"djinn-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        raise ArenaFull(f"{format_bytes(nbytes)} of shared memory asked: {exc.strerror}") from exc
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as exc:
        os.close(fd)
        if exc.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        raise ArenaFull(f"the system refused {format_bytes(nbytes)} of shared memory") from exc
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def available() -> int:
    """Bytes this process could still allocate without swapping, as the kernel reckons."""
    free = _number(Path("/proc/meminfo"), "MemAvailable") * 1024
    limit = _number(CGROUP / "memory.max")  # of a container; "max", or no file, where there is none
    if limit:
        used = _number(CGROUP / "memory.current")
        reclaimable = _number(CGROUP / "memory.stat", "inactive_file")
        free = min(free, max(0, limit - used + reclaimable))
    return free


def installed() -> int:
    """Bytes that this process could have if nobody else used any."""
    limit = _number(CGROUP / "memory.max")
    total = _number(Path("/proc/meminfo"), "MemTotal") * 1024
    return min(total, limit) if limit else total


def _number(path: Path, name: str = "") -> int:
    """The number in the file, or in its line that starts with *name*; 0 where there is none. Raises
    OSError where it cannot be told."""
    try:
        found = re.search(rf"^{name}:?\s*(\d+)", path.read_text(), re.MULTILINE)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):  # of descriptors, not memory, there is none
            raise
        return 0
    return int(found[1]) if found else 0


def sealed_size(fd: int) -> int:
    """Bytes behind *fd*, which a peer sent. Raises ProtocolError unless its size is sealed, and for huge
    pages: what its maker has taken out of them may not be had again, and reading it is a SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise ProtocolError("the descriptor is no sealable memory") from exc
    if seals & SEALS != SEALS:
        raise ProtocolError(f"shared memory must be sealed against resizing: its seals are {seals}")
    if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise ProtocolError("shared memory must be of pages of the usual size")
    return os.fstat(fd).st_size


def read_only(fd: int) -> int:
    """A second descriptor of the same memory that cannot be mapped for writing."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def duplicates(fds: Sequence[int]) -> list[int]:
    """Second descriptors of *fds*: of all, or, where there are too few left, of none. Raises OSError."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except BaseException:
        for fd in made:
            os.close(fd)
        raise
    return made


def mapped(fd: int, nbytes: int, *, writable: bool) -> mmap.mmap:
    """Map all of *fd*. A writable map is faulted in at once: a first touch costs 1-2 us a page.

    Raises ProtocolError where the descriptor does not allow writing.
    """
    if not writable:
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    try:
        made = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except PermissionError as exc:
        raise ProtocolError("the shared memory may only be read") from exc
    _fault_in(made, nbytes)
    return made


def _fault_in(made: mmap.mmap, nbytes: int) -> None:
    """Touch all of *made* without the GIL, which MAP_POPULATE holds: the kernel clears a page when it is
    first touched, 40 ms for 64 MiB. A piece at a time: whoever else maps memory in this process, a driver
    that allocates too, waits for it meanwhile. Where the kernel is older than 5.14 pages are touched when used."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(made))
    for offset in range(0, nbytes, AT_ONCE):
        size = min(AT_ONCE, nbytes - offset)
        _libc.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(size), MADV_POPULATE_WRITE)
