"""Which process runs on which CPU. Ratios of processes that wake each other are unstable without.

A new thread inherits the affinity of the one that starts it; threads that already run have to be
set one by one, also those that libzmq, gRPC or OpenMP started.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from djinn_zmq.errors import RequestError

SPINNING = 4  # CPUs: for a client, a server and an engine that do not sleep, and all the rest


@dataclass(frozen=True, slots=True)
class Pinned:
    """What was pinned where; printed and kept in the results. cpus: None: left as it was."""

    who: str
    pids: tuple[int, ...]
    threads: int
    cpus: tuple[int, ...] | None

    def __str__(self) -> str:
        where = "not pinned" if self.cpus is None else f"on CPU {_listed(self.cpus)}"
        count = len(self.pids)
        processes = f"{count} process{'es' if count > 1 else ''}, {self.threads} threads"
        return f"{self.who} ({processes}) {where}"

    def as_json(self) -> dict[str, Any]:
        return {
            "who": self.who,
            "processes": len(self.pids),
            "threads": self.threads,
            "cpus": None if self.cpus is None else list(self.cpus),
        }


def pin(who: str, pids: Iterable[int], cpus: Iterable[int] | None) -> Pinned:
    """Let all threads of *pids* run on *cpus* only. None: leave them, and say so.

    Raises OSError for a CPU this process may not use, ProcessLookupError for a process that ended.
    """
    chosen = None if cpus is None else tuple(sorted(set(cpus)))
    pids = tuple(pids)
    threads = 0
    for pid in pids:
        threads += len(_thread_ids(pid)) if chosen is None else _pin_process(pid, chosen)
    return Pinned(who, pids, threads, chosen)


def _pin_process(pid: int, cpus: tuple[int, ...]) -> int:
    """Until no thread is left that was started, unpinned, while the others were being pinned."""
    done: set[int] = set()
    while left := [thread for thread in _thread_ids(pid) if thread not in done]:
        for thread in left:
            try:
                os.sched_setaffinity(thread, cpus)
            except ProcessLookupError:
                if thread == pid:
                    raise
            done.add(thread)
    return len(done)


def two_sides() -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """(client's CPUs, servers' CPUs): the first and the second this process may use.

    With one CPU only there are no two sides: (None, None).
    """
    allowed = sorted(os.sched_getaffinity(0))
    return ((allowed[0],), (allowed[1],)) if len(allowed) > 1 else (None, None)


def too_few_to_spin() -> str:
    """Why ends that spin would measure nothing but each other here; empty where each has a CPU."""
    count = len(os.sched_getaffinity(0))
    if count >= SPINNING:
        return ""
    return (
        f"ends that spin need a CPU each and one for all the rest, {SPINNING}: this program may use "
        f"{count}"
    )


def check_spinning() -> None:
    """Raises RequestError where there are too few CPUs."""
    if why := too_few_to_spin():
        raise RequestError(why)


def _thread_ids(pid: int) -> list[int]:
    """Raises ProcessLookupError where the process is gone."""
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None


def _listed(cpus: tuple[int, ...]) -> str:
    return ", ".join(str(cpu) for cpu in cpus)
