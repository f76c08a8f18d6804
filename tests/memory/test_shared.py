"""Memory between processes: seals, rights, and what remains when one of them is killed."""

import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from djinn_zmq.errors import ArenaFull, ProtocolError
from djinn_zmq.memory import shared
from djinn_zmq.memory.arena import GRANULE, Arena, OwnArena
from djinn_zmq.settings import MIB
from djinn_zmq.wire.tensors import Slot

Start = Callable[[str], "subprocess.Popen[bytes]"]
Other = tuple[socket.socket, Start]
ROOT = Path(__file__).parents[2]

READER = """
import socket, sys
from djinn_zmq.errors import StaleSlot
from djinn_zmq.memory.arena import Arena
from djinn_zmq.wire.tensors import Slot
sock = socket.socket(fileno=int(sys.argv[1]))
data, fds, _, _ = socket.recv_fds(sock, 100, 1)
index, generation, nbytes = map(int, data.split())
arena, slot = Arena(3, fds[0]), Slot(3, index, generation)
sock.send(arena.read(slot, nbytes))
sock.recv(1)
try:
    arena.read(slot, nbytes)
except StaleSlot as exc:
    sock.send(str(exc).encode())
"""

OWNER = """
import os, socket, sys
from djinn_zmq.memory.arena import OwnArena
sock = socket.socket(fileno=int(sys.argv[1]))
arena = OwnArena.create(100_000, "doomed")
arena.number = 3
lease = arena.lease(7, 1)
lost = arena.lease(7, 1)
lease.view[:] = b"outlive"
socket.send_fds(sock, [f"{lease.slot.index} {lease.slot.generation}".encode()], [arena.fd])
sock.recv(1)
"""


@pytest.fixture
def other() -> Iterator[Other]:
    """A socket, and what starts a process at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        started.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT))
        theirs.close()
        return started[-1]

    yield ours, start
    ours.close()
    for process in started:
        process.kill()
        process.wait()


def test_another_process_reads_a_slot_and_sees_when_it_is_given_back(other: Other) -> None:
    sock, start = other
    arena = OwnArena.create(10 * GRANULE, "test")
    arena.number = 3
    lease = arena.lease(5, holder=1)
    assert lease is not None
    lease.view[:] = b"hello"
    process = start(READER)
    words = f"{lease.slot.index} {lease.slot.generation} 5".encode()
    fd = shared.read_only(arena.fd)
    socket.send_fds(sock, [words], [fd])
    os.close(fd)
    assert sock.recv(100) == b"hello"
    arena.give_back(lease.slot)
    sock.send(b"!")
    assert b"slot 0 of arena 3 is at generation 2" in sock.recv(200)
    assert process.wait(20) == 0
    del lease
    arena.close()


def test_memory_outlives_the_killed_process_that_made_it(other: Other) -> None:
    sock, start = other
    process = start(OWNER)
    data, fds, _, _ = socket.recv_fds(sock, 100, 1)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    index, generation = map(int, data.split())
    arena = OwnArena(3, fds[0])
    assert arena.used == 2 * GRANULE
    lease = arena.adopt(Slot(3, index, generation), 7, holder=1)
    assert bytes(lease.view) == b"outlive"
    assert arena.sweep_unleased() == 1
    del lease
    arena.leases.clear()
    arena.close()


@pytest.fixture
def memory() -> Iterator[int]:
    fd = shared.create(4 * GRANULE, "test")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("nbytes", [0, GRANULE, 5 * GRANULE])
def test_nobody_can_change_the_size(memory: int, nbytes: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory, nbytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert shared.sealed_size(memory) == 4 * GRANULE


def test_its_pages_are_there_before_anybody_maps_it(memory: int) -> None:
    assert os.fstat(memory).st_blocks * 512 == 4 * GRANULE


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW])
def test_memory_that_could_still_be_resized_is_refused(seals: int) -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, GRANULE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ProtocolError, match="sealed against resizing"):
        Arena(1, fd)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_huge_pages_are_refused() -> None:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    fd = os.memfd_create("huge", flags | os.MFD_HUGETLB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, shared.SEALS)
    with pytest.raises(ProtocolError, match="pages of the usual size"):
        Arena(1, fd)


def test_what_is_no_sealable_memory_is_refused(tmp_path: Path) -> None:
    read, write = os.pipe()
    with open(tmp_path / "file", "w") as file:
        for fd in (read, file.fileno()):
            with pytest.raises(ProtocolError, match="seal"):
                shared.sealed_size(fd)
    os.close(read)
    os.close(write)


def test_a_read_only_descriptor_cannot_be_mapped_for_writing(memory: int) -> None:
    os.pwrite(memory, b"seen", 0)
    fd = shared.read_only(memory)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(ProtocolError, match="may only be read"):
        shared.mapped(fd, 4 * GRANULE, writable=True)
    with pytest.raises(OSError):
        os.write(fd, b"no")
    mapping = shared.mapped(fd, 4 * GRANULE, writable=False)
    assert mapping[:4] == b"seen"
    with pytest.raises(TypeError):
        mapping[0] = 1
    mapping.close()
    os.close(fd)


def test_no_descriptor_is_inherited_by_a_program_started_later(memory: int) -> None:
    second = shared.read_only(memory)
    assert not os.get_inheritable(memory)
    assert not os.get_inheritable(second)
    os.close(second)


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """A net: no memfd beyond 64 MiB, whatever a test asks for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_large_files")
def test_memory_the_system_does_not_have_is_refused_with_sizes() -> None:
    with pytest.raises(
        ArenaFull, match=r"4294967296.0 GiB of shared memory asked, the system has .* free"
    ):
        shared.create(1 << 62, "huge")


@pytest.mark.usefixtures("no_large_files")
def test_memory_the_kernel_refuses_is_refused_by_name() -> None:
    with pytest.raises(ArenaFull, match="the system refused 65.0 MiB of shared memory"):
        shared.create(65 * MIB, "large")


def test_free_memory_is_what_the_kernel_says_or_what_a_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "CGROUP", tmp_path)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert MIB < shared.available() <= total
    (tmp_path / "memory.max").write_text("max\n")
    assert MIB < shared.available() <= total
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 9\ninactive_file 300\n")
    assert shared.available() == 1300
    with pytest.raises(ArenaFull, match="4.0 KiB of shared memory asked, the system has 1.3 KiB"):
        shared.create(4096, "test")


def test_where_there_are_no_descriptors_it_is_they_that_are_missed_and_not_memory() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)  # the lowest that is not in use
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(ArenaFull, match="4.0 KiB of shared memory asked: Too many open files"):
            shared.create(GRANULE, "test")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_arena_that_cannot_be_mapped_is_refused_and_leaves_nothing() -> None:
    """Its map has a descriptor of its own."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(ArenaFull, match="KiB of shared memory to be mapped: Too many open"):
            OwnArena.create(GRANULE, "test")
        os.close(os.open("/dev/null", os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
