"""CURVE keys on disk, and who may come in: ZAP, answered inside the server's own loop.

A key file holds one or two lines, `public = …` and `secret = …`, each 40 characters of Z85. Files
with a secret are made with mode 0600 from their first byte, never tightened afterwards.

    DIR/server.key        the server's pair                       0600
    DIR/server.pub        what clients need of it
    DIR/NAME.key          a client's pair, to be carried to it    0600
    DIR/allowed/NAME.pub  who may connect
"""

import logging
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.utils.z85

from djinn_zmq.bus.limits import has_message
from djinn_zmq.errors import AccessDenied, RequestError

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
DOMAIN = b"djinn"
KEY_LENGTH = 40
TOLD_LIMIT = 100
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What a key file says. secret: None in a .pub file."""

    public: bytes
    secret: bytes | None


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's pair, and the directory whose `allowed` keys it lets in."""

    pair: KeyFile
    directory: Path

    def secure(self, socket: "zmq.Socket[bytes]") -> None:
        """Before bind: no peer gets past the handshake without an allowed key."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        assert self.pair.secret is not None
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.pair.public)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)

    def name_of(self, public: bytes) -> str | None:
        """The name under which *public* may come in, or None. Read anew for every handshake, so
        that `djinn keys allow` works on a running server. Raises OSError where that cannot be told."""
        try:
            paths = sorted((self.directory / "allowed").iterdir())
        except FileNotFoundError:  # none is allowed yet
            return None
        for path in (path for path in paths if path.name.endswith(".pub")):
            try:
                _check_name(path.stem)
                if read(path).public == public:
                    return path.stem
            except (RequestError, AccessDenied) as exc:
                _log.warning("skipped: %s", exc)
        return None


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A client's own pair and the server's public key."""

    pair: KeyFile
    server: bytes

    def secure(self, socket: "zmq.Socket[bytes]") -> None:
        assert self.pair.secret is not None
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.pair.public)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)


def new_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Make NAME.key (0600) and NAME.pub in *directory*. Returns both paths.

    Raises RequestError where either exists already, or the name is no plain file name.
    """
    _check_name(name)
    _make(directory)
    public, secret = zmq.curve_keypair()
    lines = f"public = {public.decode()}\n"
    pair_path = _create(directory / f"{name}.key", 0o600, lines + f"secret = {secret.decode()}\n")
    try:
        return pair_path, _create(directory / f"{name}.pub", 0o644, lines)
    except BaseException:
        pair_path.unlink()  # half a pair, beside another pair's public half
        raise


def allow(directory: Path, public_file: Path) -> Path:
    """Let the client with *public_file* in: copy its public key to DIR/allowed. Returns the copy.

    Only the public half is copied, whichever file of the pair was given.
    """
    key = read(public_file)
    _check_name(public_file.stem)
    _make(directory / "allowed")
    target = directory / "allowed" / f"{public_file.stem}.pub"
    return _create(target, 0o644, f"public = {key.public.decode()}\n")


def _check_name(name: str) -> None:
    """A key's name is a file's name, and the user id that its messages carry."""
    if not NAME.fullmatch(name):
        raise RequestError(f'{name!r} is no name for a key: use letters, digits, "-", "_" and "."')


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise RequestError(f"cannot make {directory} for keys: {exc.strerror}") from exc


def _create(path: Path, mode: int, text: str) -> Path:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as exc:
        raise RequestError(
            f"{path} exists already: remove it first, or choose another name"
        ) from exc
    except OSError as exc:
        raise RequestError(f"cannot write {path}: {exc.strerror}") from exc
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
    except OSError as exc:
        path.unlink()  # half of it would be in the way of the next
        raise RequestError(f"cannot write {path}: {exc.strerror}") from exc
    return path


def read(path: Path) -> KeyFile:
    """Raises RequestError for what is no key file, AccessDenied for a secret others can read."""
    try:
        text = path.read_text()
        found = path.stat()
    except OSError as exc:
        raise RequestError(f"cannot read key file {path}: {exc.strerror}") from exc
    except ValueError as exc:  # no text; or a NUL in the path
        raise RequestError(f"cannot read key file {path}: {exc}") from exc
    words: dict[str, bytes] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name.strip() in ("public", "secret"):
            words[name.strip()] = value.strip().encode()
    if "public" not in words or not all(_is_key(word) for word in words.values()):
        raise RequestError(f"{path} is no key file: make one with 'djinn keys new NAME'")
    if "secret" in words and stat.S_IMODE(found.st_mode) & 0o077:
        raise AccessDenied(
            f"{path} holds a secret key and has mode {stat.S_IMODE(found.st_mode):04o}: "
            f"run 'chmod 600 {path}'"
        )
    return KeyFile(words["public"], words.get("secret"))


def _is_key(word: bytes) -> bool:
    if len(word) != KEY_LENGTH:
        return False
    try:
        zmq.utils.z85.decode(word)
    except (KeyError, struct.error):  # a character, or a group of five, that Z85 does not have
        return False
    return True


def server_keys(directory: Path) -> ServerKeys:
    """The server's keys of *directory*. Raises RequestError where there is no pair in it."""
    path = directory / "server.key"
    if not path.exists():
        raise RequestError(f"no {path}: make it with 'djinn keys new server --keys {directory}'")
    pair = read(path)
    if pair.secret is None:
        raise RequestError(f"{path} holds no secret key")
    return ServerKeys(pair, directory)


def client_keys(key: str | os.PathLike[str], server: str | os.PathLike[str] | None) -> ClientKeys:
    """A client's pair at *key*, and the server's public key at *server* (default: beside it)."""
    path = Path(key)
    pair = read(path)
    if pair.secret is None:
        raise RequestError(f"{path} holds no secret key: give the .key file, not the .pub")
    server_path = Path(server) if server is not None else path.with_name("server.pub")
    return ClientKeys(pair, read(server_path).public)


class Admission:
    """Answers libzmq's ZAP questions from the server's own loop; no thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)
        self._keys = keys
        self._told: set[bytes] = set()  # whose refusal is in the log

    def answer(self) -> None:
        """Answer every waiting question: 200 and the key's name, or 400; 300, after which a client
        tries again, where there is no descriptor, say, to look with."""
        while has_message(self.socket):
            self._answer_one()

    def _answer_one(self) -> None:
        frames = self.socket.recv_multipart(zmq.DONTWAIT)
        version, request = (frames + [b"", b""])[:2]
        status, text, name = b"400", b"key not allowed", None
        try:
            if len(frames) == 7 and version == ZAP_VERSION and frames[5] == b"CURVE":
                public = zmq.utils.z85.encode(frames[6])
                name = self._keys.name_of(public)
                if name is None:
                    self._tell(public, frames[3])
        except OSError as exc:
            _log.warning("the allowed keys cannot be read: %s", exc)
            status, text = b"300", b"try again"
        if name is not None:
            status, text = b"200", b"OK"
        self.socket.send_multipart([ZAP_VERSION, request, status, text, (name or "").encode(), b""])

    def _tell(self, public: bytes, address: bytes) -> None:
        """Have a refusal in the log: once a key, for its client tries again and again, and of so many keys
        only, which anybody can make."""
        if public in self._told or len(self._told) == TOLD_LIMIT:
            return
        self._told.add(public)
        where = self._keys.directory / "allowed"
        _log.warning(
            "refused %s: its key %s is not in %s%s", address.decode(errors="replace"), public.decode(), where,
            "; no more are named" if len(self._told) == TOLD_LIMIT else "",
        )  # fmt: skip

    def close(self) -> None:
        self.socket.close(linger=0)
