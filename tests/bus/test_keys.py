import contextlib
import errno
import hashlib
import os
import resource
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from djinn_zmq.bus import keys
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.keys import Admission, ClientKeys, KeyFile
from djinn_zmq.bus.router import Incoming, Router
from djinn_zmq.errors import AccessDenied, RequestError
from djinn_zmq.settings import Settings

WAIT_MS = 10_000
SEEN_OFF_MS = 500
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
ANY_FAILURE = FAILED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- files


def test_a_secret_is_its_owners_alone_from_its_first_byte(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: dict[str, int] = {}
    really_open = os.fdopen

    def open_and_look(fd: int, *options: Any) -> Any:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        modes[name] = stat.S_IMODE(os.fstat(fd).st_mode)
        assert os.fstat(fd).st_size == 0
        return really_open(fd, *options)

    monkeypatch.setattr(os, "fdopen", open_and_look)
    mask = os.umask(0)
    try:
        pair_path, public_path = keys.new_pair(directory / "new", "server")
    finally:
        os.umask(mask)
    assert modes == {"server.key": 0o600, "server.pub": 0o644}
    assert (mode(pair_path), mode(public_path), mode(directory / "new")) == (0o600, 0o644, 0o700)
    pair, public = keys.read(pair_path), keys.read(public_path)
    assert pair.public == public.public
    assert pair.secret and len(pair.secret) == 40
    assert public.secret is None


@pytest.mark.parametrize("existing", ["server.key", "server.pub"])
def test_keys_that_exist_are_not_overwritten_and_no_half_pair_is_left(
    directory: Path, existing: str
) -> None:
    (directory / existing).write_text("mine")
    with pytest.raises(RequestError, match=f"{existing} exists already"):
        keys.new_pair(directory, "server")
    assert [path.name for path in directory.iterdir()] == [existing]
    assert (directory / existing).read_text() == "mine"


def test_where_there_is_no_room_for_a_key_none_is_left_in_the_way(directory: Path) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(RequestError, match=r"cannot write .*server.key"):
            keys.new_pair(directory, "server")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(directory.iterdir())
    keys.new_pair(directory, "server")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/etc/x", "a\nb", "é", "\udcff", "x" * 101]
)
def test_a_name_that_is_no_plain_file_name_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(RequestError, match="is no name for a key"):
        keys.new_pair(directory, name)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("secret_mode", [0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_secret_that_others_can_reach_is_refused(directory: Path, secret_mode: int) -> None:
    path, _ = keys.new_pair(directory, "server")
    path.chmod(secret_mode)
    with pytest.raises(AccessDenied, match=f"has mode {secret_mode:04o}: run 'chmod 600"):
        keys.read(path)


def test_a_public_key_may_be_read_by_all(directory: Path) -> None:
    _, path = keys.new_pair(directory, "server")
    path.chmod(0o666)
    keys.read(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"public",
        b"public = short",
        b"public = " + b"x" * 41,
        b"public = " + b"~" * 40,  # not a character of Z85
        b"public = " + b"#" * 40,  # beyond 32 bits in each group
        b"secret = " + b"0" * 40,
        b"public = " + b"0" * 40 + b"\nsecret = 1",
        b"\xff\xfe",
        b"public = " + "é".encode() * 20,
    ],
)
def test_what_is_no_key_file_is_refused_by_name(directory: Path, text: bytes) -> None:
    path = directory / "bad.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(RequestError, match="key file"):
        keys.read(path)


def test_a_key_file_that_is_not_there_is_refused_by_name(directory: Path) -> None:
    missing = directory / "none.key"
    with pytest.raises(RequestError) as refused:
        keys.read(missing)
    assert str(refused.value) == f"cannot read key file {missing}: No such file or directory"
    for path in (directory, directory / "a\0b"):
        with pytest.raises(RequestError, match="cannot read key file"):
            keys.read(path)


def test_a_key_may_hold_an_equals_sign_and_stand_among_comments(directory: Path) -> None:
    digests = (hashlib.sha256(bytes([number])).digest() for number in range(256))
    key = next(key for key in map(z85.encode, digests) if b"=" in key and b"#" in key)
    path = directory / "odd.pub"
    path.write_text(f"# public key of nobody\n\n  public={key.decode()}  \n")
    assert keys.read(path) == KeyFile(key, None)


def test_only_the_public_half_is_allowed_in(directory: Path) -> None:
    pair_path, _ = keys.new_pair(directory / "client", "ann")
    copy = keys.allow(directory, pair_path)
    assert copy == directory / "allowed" / "ann.pub"
    assert keys.read(copy) == KeyFile(keys.read(pair_path).public, None)
    assert "secret" not in copy.read_text()
    with pytest.raises(RequestError, match="exists already"):
        keys.allow(directory, pair_path)


def test_a_file_whose_name_is_no_keys_is_not_allowed_in(directory: Path) -> None:
    _, public = keys.new_pair(directory, "ann")
    copy = public.rename(directory / "ann (1).pub")
    with pytest.raises(RequestError, match=r"'ann \(1\)' is no name for a key"):
        keys.allow(directory, copy)
    assert not (directory / "allowed").exists()


def test_a_servers_and_a_clients_keys_need_a_secret(directory: Path) -> None:
    with pytest.raises(RequestError, match="make it with 'djinn keys new server --keys"):
        keys.server_keys(directory)
    pair_path, public_path = keys.new_pair(directory, "server")
    assert keys.server_keys(directory).pair == keys.read(pair_path)
    with pytest.raises(RequestError, match="give the .key file, not the .pub"):
        keys.client_keys(public_path, None)
    ann, _ = keys.new_pair(directory, "ann")
    assert keys.client_keys(ann, None) == ClientKeys(keys.read(ann), keys.read(public_path).public)
    assert keys.client_keys(ann, public_path) == keys.client_keys(ann, None)
    pair_path.write_text(public_path.read_text())
    with pytest.raises(RequestError, match="holds no secret key"):
        keys.server_keys(directory)


# ---- the handshake


class Gate:
    """A router that asks for keys, and the loop that answers for it."""

    def __init__(self, context: Any, directory: Path) -> None:
        self.directory = directory
        keys.new_pair(directory, "server")
        server = keys.server_keys(directory)
        self.admission = Admission(context, server)
        self.router = Router(context, Settings(), server)
        self.endpoint = self.router.bind("tcp://127.0.0.1:*")
        self.monitor = self.router.socket.get_monitor_socket(ANY_FAILURE)
        self.poller = zmq.Poller()
        for socket in (self.admission.socket, self.router.socket, self.monitor):
            self.poller.register(socket, zmq.POLLIN)
        self.dealers: list[Dealer] = []

    def client(self, name: str, *, allowed: bool) -> ClientKeys:
        path, public = keys.new_pair(self.directory, name)
        if allowed:
            keys.allow(self.directory, public)
        return keys.client_keys(path, None)

    def says(self, client: ClientKeys | None, words: bytes) -> Incoming | None:
        """What gets through of *words*; None where the handshake fails."""
        dealer = Dealer(self.endpoint, Settings(), client)
        self.dealers.append(dealer)
        dealer.send(words)
        while ready := dict(self.poller.poll(WAIT_MS)):
            if self.admission.socket in ready:
                self.admission.answer()
            if self.router.socket in ready:
                return self.router.receive()
            if self.monitor in ready:
                assert recv_monitor_message(self.monitor)["event"] & ANY_FAILURE
                dealer.close()
                assert not self.router.socket.poll(0)
                return None
        raise AssertionError("nothing happened")

    def chosen(self, context: Any, client: ClientKeys, route: bytes) -> Any:
        """A client that has chosen its route, and says something."""
        socket = context.socket(zmq.DEALER)
        socket.linger, socket.routing_id = 0, route
        client.secure(socket)
        socket.connect(self.endpoint)
        socket.send(b"words")
        return socket

    def hears(self, wait_ms: int = WAIT_MS) -> Incoming | None:
        """What the router gives of the next message. Raises TimeoutError."""
        end_s = time.monotonic() + wait_ms / 1000
        while not self.router.socket.poll(0):
            if (left_s := end_s - time.monotonic()) <= 0:
                raise TimeoutError("nothing comes")
            self.poller.poll(1000 * left_s)
            self.admission.answer()
        return self.router.receive()

    def hears_successor(self, context: Any, client: ClientKeys, route: bytes) -> Incoming | None:
        """The same of who has chosen a leaving client's route: for as long as libzmq has not seen it off,
        it ignores who comes under that route, for good."""
        for _ in range(WAIT_MS // SEEN_OFF_MS):
            with self.chosen(context, client, route), contextlib.suppress(TimeoutError):
                return self.hears(SEEN_OFF_MS)
        raise TimeoutError("the one before does not leave")

    def close(self) -> None:
        for dealer in self.dealers:
            dealer.close()
        self.router.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.router.close()
        self.admission.close()


@pytest.fixture
def gate(context: Any, directory: Path) -> Iterator[Gate]:
    gate = Gate(context, directory)
    yield gate
    gate.close()


def test_an_allowed_client_comes_in_under_its_name(gate: Gate) -> None:
    incoming = gate.says(gate.client("ann", allowed=True), b"hello")
    assert incoming is not None
    route, frame, _ = incoming
    assert frame == b"hello"
    assert gate.router.identity(route) == ("127.0.0.1", "ann")
    gate.router.send(route, b"welcome")
    assert gate.dealers[0].socket.poll(WAIT_MS)
    assert gate.dealers[0].receive() == (b"welcome", [])


def test_whoever_takes_the_route_of_another_key_is_not_taken_for_it(
    gate: Gate, context: Any, until_unreachable: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ann = gate.chosen(context, gate.client("ann", allowed=True), b"route")
    came = gate.hears()
    assert came is not None and came[0] == b"route"
    assert gate.router.identity(b"route") == ("127.0.0.1", "ann")
    ann.close()
    until_unreachable(gate.router, b"route")
    bob = gate.client("bob", allowed=True)
    assert gate.hears_successor(context, bob, b"route") is None
    assert "dropped a message of ('127.0.0.1', 'bob')" in caplog.text


def test_a_client_that_is_not_allowed_does_not_come_in_and_the_log_names_its_key_once(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    eve = gate.client("eve", allowed=False)
    for _ in range(2):
        assert gate.says(eve, b"hello") is None
    key = eve.pair.public.decode()
    assert caplog.messages == [
        f"refused 127.0.0.1: its key {key} is not in {gate.directory / 'allowed'}"
    ]


def test_of_keys_without_number_the_log_names_few(
    gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "TOLD_LIMIT", 2)
    for name in ("eve", "mallory", "trudy"):
        assert gate.says(gate.client(name, allowed=False), b"hello") is None
    assert ["no more" in text for text in caplog.messages] == [False, True]


def test_a_client_without_a_key_does_not_come_in(gate: Gate) -> None:
    assert gate.says(None, b"hello") is None


def test_a_client_that_expects_another_server_does_not_come_in(gate: Gate) -> None:
    ann = gate.client("ann", allowed=True)
    assert gate.says(ClientKeys(ann.pair, ann.pair.public), b"hello") is None


def test_a_public_key_alone_opens_nothing(gate: Gate) -> None:
    """Eve has Ann's public key, which is no secret, and a secret of her own."""
    ann, eve = gate.client("ann", allowed=True), gate.client("eve", allowed=False)
    forged = ClientKeys(KeyFile(ann.pair.public, eve.pair.secret), ann.server)
    assert gate.says(forged, b"hello") is None


def test_who_is_allowed_or_no_more_is_so_at_once(gate: Gate) -> None:
    bob = gate.client("bob", allowed=False)
    assert gate.says(bob, b"hello") is None
    allowed = keys.allow(gate.directory, gate.directory / "bob.pub")
    incoming = gate.says(bob, b"hello")
    assert incoming is not None
    assert gate.router.identity(incoming[0]) == ("127.0.0.1", "bob")
    allowed.unlink()
    assert gate.says(bob, b"hello") is None


def test_files_that_are_no_keys_keep_nobody_out(gate: Gate) -> None:
    ann = gate.client("ann", allowed=True)
    allowed = gate.directory / "allowed"
    (allowed / "0.pub").write_text("nonsense")
    (allowed / "1.pub").mkdir()
    (allowed / "2.pub").symlink_to("nowhere")
    os.close(os.open(os.fsencode(allowed) + b"/\xff.pub", os.O_CREAT, 0o600))
    (allowed / "a b.pub").write_text(f"public = {ann.pair.public.decode()}\n")
    incoming = gate.says(ann, b"hello")
    assert incoming is not None
    assert gate.router.identity(incoming[0]) == ("127.0.0.1", "ann")


def test_where_there_is_no_descriptor_to_look_for_a_key_with_its_client_is_to_try_again(
    gate: Gate, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(path: Path) -> Iterator[Path]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "iterdir", look)
    libzmq = context.socket(zmq.REQ)
    libzmq.connect(keys.ZAP_ENDPOINT)
    libzmq.send_multipart([b"1.0", b"7", keys.DOMAIN, b"127.0.0.1", b"", b"CURVE", bytes(32)])
    gate.admission.answer()
    assert libzmq.recv_multipart() == [b"1.0", b"7", b"300", b"try again", b"", b""]
    libzmq.close()


def test_clients_that_are_turned_away_do_not_disturb_those_that_are_in(gate: Gate) -> None:
    incoming = gate.says(gate.client("ann", allowed=True), b"hello")
    assert incoming is not None
    for _ in range(3):
        assert gate.says(None, b"noise") is None
    gate.router.send(incoming[0], b"still here")
    assert gate.dealers[0].socket.poll(WAIT_MS)
    assert gate.dealers[0].receive() == (b"still here", [])
