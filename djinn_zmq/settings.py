"""Limits and places. One frozen object, built at the edge, validated once, never read at import."""

import math
import os
import stat
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path

from djinn_zmq.errors import AccessDenied, RequestError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

SOCKET_NAME = "djinn.sock"
LONGEST_SOCKET_PATH = 107  # bytes: sun_path without its final NUL
ENDPOINT_VARIABLE = "DJINN_ENDPOINT"
MAY_BE_ZERO = ("device_memory", "disk", "spin_us")
LONGEST = {"spin_us": 1_000_000, "grace_s": 7 * 86_400, "stop_s": 86_400}  # a second; a week; a day


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server and its engines may use. Sizes in bytes, times in seconds."""

    host_memory: int = 4 * GIB  # checkpoints in shared host memory, of each engine
    device_memory: int | None = None  # checkpoints on each engine's device; None: from what is free
    disk: int = 0  # checkpoints in files, of each engine
    state: str | None = None  # the directory those files are in; None: there is no disk tier
    arena: int = 64 * MIB  # size of one shared arena; larger checkpoints get one of their own
    client_arenas: int = 1 * GIB  # staging memory one client may share with the engines
    frame_limit: int = 1 * MIB + 64 * KIB  # one frame on the bus, 1 MiB of bulk and its header
    meta_limit: int = 256 * KIB  # header and meta together
    sessions_limit: int = 1024  # open sessions of one owner
    queue_limit: int = 256  # requests of one session that wait for an engine
    high_water: int = 4096  # messages queued on a socket towards one peer
    stop_s: float = 30.0  # for which an orderly stop may write to the state directory
    grace_s: float = 10.0  # a remote client that drops its connection may come back in this time
    engine_restarts: int = 5  # deaths within a minute after which an engine stays down
    spin_us: int = 0  # how long a server or an engine stays awake after a message; 0: not at all
    threads: int | None = None  # of a CPU engine; None: torch's own choice

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "state" or (value is None and field.default is None):
                continue
            kind, allowed = (
                (Real, "a number") if field.type is float else (Integral, "a whole number")
            )
            nan = isinstance(value, float) and math.isnan(value)
            if nan or not isinstance(value, kind) or isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}: it must be {allowed}")
            if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                raise RequestError(f"{name} is {value}: it must be positive")
            if name in LONGEST and not value <= LONGEST[name]:
                raise RequestError(f"{name} is {value}: at most {LONGEST[name]}")
        if self.arena % (64 * KIB):
            raise RequestError(f"arena is {self.arena} bytes: it must be a multiple of 64 KiB")


def runtime_dir() -> Path:
    """The user's own directory for sockets: mode 0700, made if it is not there.

    Raises AccessDenied if it exists but belongs to, or can be entered by, somebody else.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "djinn" if base else Path(f"/tmp/djinn-{os.getuid()}")
    return private_dir(path)


def private_dir(path: Path) -> Path:
    """Make *path* (0700) or check that it is ours alone."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except FileExistsError as exc:
        raise AccessDenied(f"{path} is no directory: name one, or one to be made") from exc
    except OSError as exc:
        raise AccessDenied(f"{path} cannot be made a directory: {exc.strerror}") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise AccessDenied(f"{path} is no directory itself: name the one it leads to")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        mend = f": run 'chmod 700 {path}'" if found.st_uid == os.getuid() else ""
        if found.st_mode & stat.S_IWOTH:  # /tmp, say, for root: others have their things there
            mend = f", for all to write in: name one of its own, {path / 'djinn'} say"
        raise AccessDenied(
            f"{path} must be a directory of uid {os.getuid()} with mode 0700: it belongs to uid "
            f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}{mend}"
        )
    return path


def socket_path(path: str | os.PathLike[str] | None = None) -> Path:
    """Where the server's ipc socket is: *path*, else the user's own.

    Raises RequestError where the path is longer than a unix socket's may be.
    """
    chosen = Path(path) if path is not None else runtime_dir() / SOCKET_NAME
    length = len(os.fsencode(chosen)) + len(".lease")  # the longest name made from it
    if length > LONGEST_SOCKET_PATH:
        raise RequestError(
            f"socket path {chosen} is too long: with its suffixes {length} bytes, "
            f"at most {LONGEST_SOCKET_PATH} fit"
        )
    return chosen


def default_endpoint() -> str:
    """$DJINN_ENDPOINT, else the user's ipc socket."""
    return os.environ.get(ENDPOINT_VARIABLE) or f"ipc://{socket_path()}"


def cache_dir() -> Path:
    """$DJINN_CACHE, else djinn/ in the user's cache directory. Not made here."""
    if chosen := os.environ.get("DJINN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "djinn"


def models_dir() -> Path:
    """Where pulled models are kept."""
    return cache_dir() / "models"


def format_bytes(nbytes: int) -> str:
    """10560000 -> '10.1 MiB'."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def counted(number: int, noun: str) -> str:
    """(1, "branch") -> '1 branch', (2, "branch") -> '2 branches'."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"
