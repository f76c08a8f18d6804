"""Keep freed memory in the process.

Bulk comes in messages of 1 MiB, which libzmq allocates in its own thread and we free in ours. glibc
gives such memory back to the kernel at once, and every page of the next message is a fault again:
measured, 490 to 860 faults and 1.5 to 2 ms for an upload of 10.56 MB.
"""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = 64 * 1024 * 1024  # bytes that may lie free
GROWTH = 8 * 1024 * 1024  # bytes asked of the kernel at once
MMAP_FROM = 32 * 1024 * 1024  # the most that glibc allows


def keep_freed_memory() -> None:
    """For the whole process. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_TOP_PAD, GROWTH)
