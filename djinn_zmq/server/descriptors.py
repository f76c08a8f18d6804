"""Have room for many clients' descriptors.

A client takes two of the server's and three of its engine's, and one for each arena. What a process may
have open is mostly limited to 1024, though it may raise that itself; and libzmq aborts the process in
which there is none left for a connection over ipc (4.3.5, ipc_listener.cpp:297).
"""

import resource
from pathlib import Path

NR_OPEN = Path("/proc/sys/fs/nr_open")
MANY = 1 << 20  # where there is no limit to raise it to


def allow_many_descriptors() -> None:
    """For this process, and for the engines that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY if hard == resource.RLIM_INFINITY else hard
    # The kernel takes no limit beyond it, not even one that we have.
    wanted = min(wanted, int(NR_OPEN.read_text()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
