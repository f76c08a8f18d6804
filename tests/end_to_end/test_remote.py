"""Clients without shared memory: over TCP, with and without keys, and over ipc by choice."""

import contextlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.bus.dealer import Dealer
from djinn_zmq.bus.keys import client_keys
from djinn_zmq.errors import (
    AccessDenied,
    Lost,
    RequestError,
    UnknownCheckpoint,
    UnknownSession,
    Unreachable,
)
from djinn_zmq.settings import Settings
from djinn_zmq.wire import codec, messages
from djinn_zmq.wire.messages import Flag
from djinn_zmq.wire.ops import Op
from tests.end_to_end.conftest import until

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"
WAIT_S = 30.0
BATCH, POSITIONS = 200, 200  # × 64 × 2 bytes: a hidden state of 5.1 MB, five pieces


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


class Raw:
    """Frames of the protocol by hand, for what the client library would never send."""

    def __init__(self, endpoint: str, key: Path | None = None) -> None:
        self._dealer = Dealer(endpoint, Settings(), client_keys(key, None) if key else None)
        self._dealer.socket.rcvtimeo = int(WAIT_S * 1000)
        self._numbers = itertools.count(1)

    def ask(self, op: Op, meta, session: int = 0, **options):
        """The reply's meta. Raises what the server refused with."""
        number = next(self._numbers)
        self._dealer.send(codec.encode(op, meta, request=number, session=session, **options))
        while True:
            frames = self._dealer.receive(wait=True)
            assert frames is not None, f"no answer to {op!r}"
            message = codec.decode(*frames)
            if message.header.request != number or message.header.flags & Flag.PROGRESS:
                continue  # the server's knock
            if message.header.flags & Flag.ERROR:
                raise codec.error_of(message)
            return message.meta

    def close(self) -> None:
        self._dealer.close()


@pytest.fixture
def raw():
    """Connect by hand: `raw(endpoint, key)`."""
    with contextlib.ExitStack() as stack:

        def connect(endpoint: str, key: Path | None = None) -> Raw:
            one = Raw(endpoint, key)
            stack.callback(one.close)
            return one

        yield connect


@pytest.fixture
def remote(served):
    """A client over tcp, without a key."""
    with djinn.connect(served.tcp) as server:
        yield server


# ---- without keys, on the loopback


@pytest.mark.parametrize("way", ["tcp", "ipc without shared memory"])
def test_the_main_job_without_shared_memory_gives_the_same_bits_as_with_it(served, tiny, way):
    endpoint = served.tcp if way == "tcp" else served.endpoint
    with djinn.connect(endpoint, shared=False) as server:
        assert server.connection.sharing.lease is None
        far = server.model("tiny")
        assert far.session_id != tiny.session_id
        here, there = tiny.run(FRANCE, stop_at=2), far.run(FRANCE, stop_at=2)
        assert bits(there.checkpoint.hidden) == bits(here.checkpoint.hidden)
        row = there.checkpoint.hidden[0, -1]
        assert row.shape == (64,) and bits(row) == bits(here.checkpoint.hidden[0, -1])
        assert bits(there.checkpoint.hidden[:, ::2, [5, 1]]) == bits(
            here.checkpoint.hidden[:, ::2, [5, 1]]
        )
        edit = djinn.Add(np.linspace(-1, 1, 64), at=(0, -1))
        assert bits(there.checkpoint.resume([edit]).logits) == bits(
            here.checkpoint.resume([edit]).logits
        )
        assert bits(there.checkpoint.resume().logits) == bits(tiny.run(FRANCE).logits)
        germany = far.run(GERMANY, stop_at=2).checkpoint
        swapped = there.checkpoint.resume(hidden=germany.hidden.fetch())
        assert swapped.top(1)[0].token == "berlin"
        patched = there.checkpoint.resume([djinn.Patch(germany, at=(0, 3))], logits=3)
        assert [one.token for one in patched.top(3)] == [
            one.token
            for one in here.checkpoint.resume(
                [djinn.Patch(tiny.run(GERMANY, stop_at=2).checkpoint, at=(0, 3))]
            ).top(3)
        ]


@pytest.mark.parametrize("way", ["tcp", "ipc without shared memory"])
def test_a_hidden_state_of_several_pieces_comes_and_goes_whole(served, server, tiny, way):
    ids = np.random.default_rng(7).integers(0, tiny.vocab_size, (BATCH, POSITIONS))
    here = tiny.run(ids, stop_at=3, logits="none").checkpoint
    assert here.nbytes > 4 * 1024 * 1024
    endpoint = served.tcp if way == "tcp" else served.endpoint
    with djinn.connect(endpoint, shared=False) as remote:
        far = remote.model("tiny")
        used = server.status().memory.used
        point = far.run(ids, stop_at=3, logits="none").checkpoint
        whole = point.hidden.fetch()
        assert (whole.shape, whole.nbytes) == ((BATCH, POSITIONS, 64), point.nbytes)
        assert bits(whole) == bits(here.hidden)
        assert bits(point.hidden[10:190, 1:, ::2]) == bits(whole[10:190, 1:, ::2])
        whole[:, -1] = 0
        mine = here.resume(hidden=whole, logits="all")
        theirs = point.resume(hidden=whole, logits="all")
        assert theirs.logits.nbytes > 1024 * 1024  # they too come in pieces
        assert bits(theirs.logits) == bits(mine.logits)
        again = point.resume([djinn.Set(whole)], stop_at=3, logits="none").checkpoint
        assert bits(again.hidden) == bits(whole)
        del theirs, again, mine
        point.release()
        far.ping()
        until(lambda: server.status().memory.used <= used, "uploads and logits are given back")


def test_a_client_without_a_key_gets_only_what_is_served_by_name(served, remote, server, tmp_path):
    assert remote.model("tiny").run(FRANCE).top(1)[0].token == "paris"
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "nothing"), "owner/model", "../tiny", "nonsense"):
        with pytest.raises(AccessDenied, match="a client without a key gets: tiny"):
            remote.model(name)
    with pytest.raises(AccessDenied, match="only the user who runs the server"):
        remote.stop()
    assert server.ping() == remote.ping() == "serving"
    assert served.process.poll() is None


def every_way_into(session: int, number: int):
    """One request of every kind that names a session, and a checkpoint where it does."""
    wanted = messages.Wanted(None, (), "last", 0)
    return [
        (Op.PING, messages.Ping()),
        (Op.RUN, messages.Run((FRANCE,), None, wanted)),
        (Op.RESUME, messages.Resume(number, None, (), wanted)),
        (Op.READ, messages.Read(number, (), 0, 64)),
        (Op.RELEASE, messages.Release((number,))),
        (Op.CANCEL, messages.Cancel(1)),
        (Op.TOKENS, messages.Tokens(FRANCE, None)),
        (Op.UPLOAD, messages.Upload(4096)),
        (Op.CLOSE, messages.Close()),
    ]


def test_nobody_can_do_anything_in_another_connections_session(served, tiny, remote, raw):
    theirs = remote.model("tiny")
    for model in (tiny, theirs):
        point = model.run(FRANCE, stop_at=2).checkpoint
        stranger = raw(served.tcp)
        for op, meta in every_way_into(model.session_id, point.id):
            with pytest.raises(UnknownSession, match="does not exist or is not yours"):
                stranger.ask(op, meta, model.session_id)
        assert point.resume().top(1)[0].token == "paris"


def test_a_checkpoint_of_another_session_cannot_be_reached_from_ones_own(served, tiny, raw):
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    stranger = raw(served.tcp)
    own = stranger.ask(Op.OPEN, messages.Open("tiny")).session
    for op, meta in every_way_into(own, point.id):
        if op in (Op.RESUME, Op.READ, Op.RELEASE):
            with pytest.raises(UnknownCheckpoint):
                stranger.ask(op, meta, own)
    assert stranger.ask(Op.PING, messages.Ping(), own).state == "idle"
    assert point.resume().top(1)[0].token == "paris"


def test_strangers_sessions_are_their_own_and_not_marked_as_anybody_elses(served, remote, tiny):
    theirs = remote.model("tiny")
    mine = {one.id: one for one in tiny.server.sessions()}
    assert mine[theirs.session_id].owner.startswith("tcp:")
    assert (mine[theirs.session_id].yours, mine[tiny.session_id].yours) == (False, True)
    seen = {one.id: one.yours for one in remote.sessions()}
    assert (seen[theirs.session_id], seen[tiny.session_id]) == (True, False)
    with djinn.connect(served.tcp) as other:
        assert not any(one.yours for one in other.sessions())


PAUSED = """
import os, sys, djinn_zmq as djinn
endpoint, key = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
model = djinn.connect(endpoint, key=key).model("tiny")
point = model.run("the capital of france is", stop_at=2).checkpoint
print(model.session_id, point.id, flush=True)
os.read(0, 1)
"""


@contextlib.contextmanager
def paused(endpoint: str, *key: Path):
    """Another process, stopped at a checkpoint: (process, session, checkpoint)."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, endpoint, *map(str, key)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            session, number = map(int, process.stdout.readline().split())
            yield process, session, number
        finally:
            process.kill()


def sessions_of(server) -> dict[int, messages.SessionInfo]:
    return {one.id: one for one in server.sessions()}


def test_a_killed_client_without_a_key_leaves_no_session_and_no_checkpoint(served, server):
    before = server.status()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(paused(served.tcp)) for _ in range(3)]
        assert {session for _, session, _ in clients} <= set(sessions_of(server))
        for process, _, _ in clients:
            process.kill()
    for _, session, _ in clients:
        until(lambda session=session: session not in sessions_of(server), "its session ends")
    after = server.status()
    assert after.memory.checkpoints == before.memory.checkpoints
    assert after.memory.used <= before.memory.used


CROWD = """
import os, signal, sys, djinn_zmq as djinn
servers = [djinn.connect(sys.argv[1]) for _ in range(8)]
models = [server.model("tiny") for server in servers]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_many_connections_that_end_at_once_are_all_noticed(served, server):
    before = set(sessions_of(server))
    for _ in range(5):
        subprocess.run([sys.executable, "-c", CROWD, served.tcp], check=False)
        until(lambda: set(sessions_of(server)) <= before, "their sessions end")


def test_once_its_server_is_gone_every_request_of_a_client_says_so(serve):
    with serve(port=free_port()) as running, djinn.connect(running.tcp) as server:
        assert server.ping() == "serving"
        running.process.kill()
        for _ in range(3):
            with pytest.raises(Lost, match="the server at tcp://.* is gone"):
                server.ping()
        running.process.wait()


def test_a_server_that_is_not_there_is_reported_within_the_timeout():
    begin = time.monotonic()
    with pytest.raises(Unreachable, match="no server answers at tcp://127.0.0.1:1 within 0.5 s"):
        djinn.connect("tcp://127.0.0.1:1", timeout_s=0.5)
    assert time.monotonic() - begin < WAIT_S


# ---- with keys


def keys_command(directory: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "djinn_zmq.cli.main", "keys", *words, "--keys", str(directory)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Keys of a server and of alice and bob, who may come in, and of mallory, who may not."""
    directory = tmp_path_factory.mktemp("keys") / "made"
    for name in ("server", "alice", "bob", "mallory"):
        assert keys_command(directory, "new", name).returncode == 0
    for name in ("alice", "bob"):
        assert keys_command(directory, "allow", str(directory / f"{name}.pub")).returncode == 0
    return directory


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, keys):
    """(tcp endpoint, ipc endpoint) of a server on the loopback that wants keys over tcp."""
    path = tmp_path_factory.mktemp("keyed") / "run" / "djinn.sock"
    path.parent.mkdir(mode=0o700)
    log = path.parent.parent / "log"
    with log.open("wb") as words:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "djinn_zmq.server",
                "--device=cpu",
                "--threads=1",
                "--model=tiny",
                f"--port={free_port()}",
                f"--ipc={path}",
                f"--keys={keys}",
                "--grace-s=3",
            ],
            stdout=words,
            stderr=words,
            stdin=subprocess.DEVNULL,
        )
    try:
        until(lambda: path.exists() or process.poll() is not None, "the socket is there")
        with djinn.connect(f"ipc://{path}", timeout_s=WAIT_S) as server:
            server.model("tiny")
            tcp = next(end for end in server.status().endpoints if end.startswith("tcp://"))
        yield tcp, f"ipc://{path}"
        process.terminate()
        assert process.wait(WAIT_S) == 0
        assert os.listdir(path.parent) == []
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_secret_keys_are_for_their_user_alone_and_public_ones_hold_no_secret(keys):
    for name in ("server", "alice", "bob", "mallory"):
        assert stat.S_IMODE((keys / f"{name}.key").stat().st_mode) == 0o600
        assert "secret" in (keys / f"{name}.key").read_text()
        assert "secret" not in (keys / f"{name}.pub").read_text()
    assert sorted(os.listdir(keys / "allowed")) == ["alice.pub", "bob.pub"]
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    listed = keys_command(keys, "list").stdout.splitlines()
    assert {line.split()[1] for line in listed} >= {"alice", "bob"}
    assert (keys / "alice.pub").read_text().split()[-1] in listed[0]


def test_allowing_a_whole_key_file_copies_only_its_public_half(keys, tmp_path):
    assert keys_command(tmp_path, "allow", str(keys / "alice.key")).returncode == 0
    assert (tmp_path / "allowed" / "alice.pub").read_text() == (keys / "alice.pub").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["new", "alice"], "alice.key exists already"),
        (["new", "../alice"], "is no name for a key"),
        (["new", "a b"], "is no name for a key"),
        (["new", ""], "is no name for a key"),
        (["allow", "alice.pub"], "allowed/alice.pub exists already"),
        (["allow", "log"], "is no key file"),
    ],
)
def test_what_cannot_be_done_with_keys_is_refused_in_one_sentence(keys, words, complaint):
    (keys / "log").write_text("not a key")
    if words[0] == "allow":
        words = ["allow", str(keys / words[1])]
    done = keys_command(keys, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr


def test_keys_in_a_directory_that_cannot_be_made_are_refused_in_one_sentence(keys):
    done = keys_command(keys / "more" / "deeper", "new", "carol")
    assert done.returncode == 0  # parents are made
    (keys / "file").write_text("")
    done = keys_command(keys / "file" / "deeper", "new", "carol")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr


def test_an_allowed_key_gets_in_and_owns_its_sessions(keyed, keys):
    tcp, ipc = keyed
    with djinn.connect(tcp, key=keys / "alice.key") as server, djinn.connect(ipc) as owner:
        assert server.connection.sharing.lease is None
        model = server.model("tiny")
        assert model.run(FRANCE, stop_at=2).checkpoint.resume().top(1)[0].token == "paris"
        session = sessions_of(owner)[model.session_id]
        assert (session.owner, session.yours) == ("key:alice", False)
        assert sessions_of(server)[model.session_id].yours
        with pytest.raises(AccessDenied, match="only the user who runs the server"):
            server.stop()
    with djinn.connect(ipc) as owner:
        assert model.session_id not in sessions_of(owner)  # closed properly: nothing is kept


def test_bulk_goes_through_curve_whole(keyed, keys):
    tcp, ipc = keyed
    with djinn.connect(tcp, key=keys / "alice.key") as server, djinn.connect(ipc) as near:
        far, here = server.model("tiny"), near.model("tiny")
        ids = np.random.default_rng(8).integers(0, far.vocab_size, (BATCH, POSITIONS))
        point = far.run(ids, stop_at=1, logits="none").checkpoint
        whole = point.hidden.fetch()
        assert bits(whole) == bits(here.run(ids, stop_at=1, logits="none").checkpoint.hidden)
        whole[0] = 1
        again = point.resume(hidden=whole, stop_at=1, logits="none").checkpoint
        assert bits(again.hidden) == bits(whole)


def test_a_key_may_load_a_directory_that_a_stranger_may_not(keyed, keys):
    tcp, _ = keyed
    with djinn.connect(tcp, key=keys / "alice.key") as server:
        # The served name's own directory: nothing else has to be loaded for it.
        assert server.model(TINY).name == "tiny"
        with pytest.raises(RequestError, match="no served name"):
            server.model("nonsense")


@pytest.mark.parametrize("who", ["an unknown key", "no key", "a key for another server"])
def test_who_is_not_allowed_reaches_nothing(keyed, keys, tmp_path, who):
    tcp, ipc = keyed
    options: dict = {}
    if who != "no key":
        options["key"] = keys / ("mallory.key" if who == "an unknown key" else "alice.key")
    if who == "a key for another server":
        options["server_key"] = keys / "bob.pub"
    # timeout_s is far off: what the handshake refused is told at once.
    with pytest.raises(
        Unreachable, match="no server answers at tcp://.*check the endpoint and the key"
    ):
        djinn.connect(tcp, timeout_s=300.0, **options)
    with djinn.connect(ipc) as owner:
        assert all(one.owner.startswith("uid:") for one in owner.sessions())


def test_a_key_that_is_allowed_while_the_server_runs_gets_in_and_a_removed_one_no_more(keyed, keys):
    tcp, _ = keyed
    assert keys_command(keys, "new", "carol").returncode == 0
    carol = keys / "carol.key"
    with pytest.raises(Unreachable):
        djinn.connect(tcp, key=carol, timeout_s=300.0)
    assert keys_command(keys, "allow", str(keys / "carol.pub")).returncode == 0
    with djinn.connect(tcp, key=carol) as server:
        assert server.model("tiny").run(FRANCE).top(1)[0].token == "paris"
    (keys / "allowed" / "carol.pub").unlink()
    with pytest.raises(Unreachable):
        djinn.connect(tcp, key=carol, timeout_s=300.0)


def test_a_broken_file_among_the_allowed_keeps_nobody_else_out(keyed, keys):
    tcp, _ = keyed
    (keys / "allowed" / "aaa.pub").write_bytes(b"\xff\xfe not a key")
    try:
        with djinn.connect(tcp, key=keys / "bob.key") as server:
            assert server.ping() == "serving"
    finally:
        (keys / "allowed" / "aaa.pub").unlink()


def test_two_keys_cannot_reach_into_each_others_sessions(keyed, keys, raw):
    tcp, ipc = keyed
    with djinn.connect(tcp, key=keys / "alice.key") as server:
        model = server.model("tiny")
        point = model.run(FRANCE, stop_at=2).checkpoint
        bob = raw(tcp, keys / "bob.key")
        own = bob.ask(Op.OPEN, messages.Open("tiny")).session
        for op, meta in every_way_into(model.session_id, point.id):
            with pytest.raises(UnknownSession, match="does not exist or is not yours"):
                bob.ask(op, meta, model.session_id)
            if op in (Op.RESUME, Op.READ, Op.RELEASE):
                with pytest.raises(UnknownCheckpoint):
                    bob.ask(op, meta, own)
        with djinn.connect(ipc) as owner:  # nor the user whose server it is
            with pytest.raises(UnknownSession):
                raw(ipc).ask(Op.CLOSE, messages.Close(), model.session_id)
            assert sessions_of(owner)[model.session_id].checkpoints == 1
        assert point.resume().top(1)[0].token == "paris"
        bob.ask(Op.CLOSE, messages.Close(), own)


def test_the_same_key_may_go_on_with_its_session_from_another_connection(keyed, keys, raw):
    tcp, _ = keyed
    with djinn.connect(tcp, key=keys / "alice.key") as server:
        model = server.model("tiny")
        point = model.run(FRANCE, stop_at=2).checkpoint
        second = raw(tcp, keys / "alice.key")
        wanted = messages.Wanted(None, (), "top", 1)
        reply = second.ask(Op.RESUME, messages.Resume(point.id, None, (), wanted), model.session_id)
        assert reply.state == "finished"
        # And the first goes on with it, though it moved meanwhile.
        assert point.resume().top(1)[0].token == "paris"


def test_a_lost_connection_of_a_key_may_come_back_to_its_session(keyed, keys, raw):
    tcp, ipc = keyed
    with djinn.connect(ipc) as owner:
        with paused(tcp, keys / "alice.key") as (process, session, number):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kept = until(
                lambda: (one := sessions_of(owner).get(session)) and one.state == "kept" and one,
                "the session is kept",
            )
        assert (kept.owner, kept.checkpoints) == ("key:alice", 1)
        with pytest.raises(UnknownSession):
            raw(tcp, keys / "bob.key").ask(Op.PING, messages.Ping(), session)
        back = raw(tcp, keys / "alice.key")
        wanted = messages.Wanted(None, (), "top", 1)
        reply = back.ask(Op.RESUME, messages.Resume(number, None, (), wanted), session)
        assert reply.state == "finished"
        assert sessions_of(owner)[session].state == "open"
        back.close()
        until(lambda: session not in sessions_of(owner), "it ends after its second loss")


def test_a_killed_client_with_a_key_leaves_nothing_once_the_grace_is_over(keyed, keys):
    tcp, ipc = keyed
    with djinn.connect(ipc) as owner:
        before = owner.status().memory
        with paused(tcp, keys / "bob.key") as (process, session, _):
            assert owner.status().memory.checkpoints == before.checkpoints + 1
            os.kill(process.pid, signal.SIGKILL)
        states = []

        def over() -> bool:
            found = sessions_of(owner).get(session)
            states.append(found.state if found else "gone")
            return found is None

        until(over, "the grace is over")
        assert list(dict.fromkeys(states))[-2:] == ["kept", "gone"]
        after = owner.status().memory
        assert (after.checkpoints, after.used) == (before.checkpoints, before.used)


def test_a_secret_that_others_could_read_is_not_used(keyed, keys, tmp_path):
    loose = tmp_path / "alice.key"
    loose.write_text((keys / "alice.key").read_text())
    loose.chmod(0o644)
    with pytest.raises(AccessDenied, match="holds a secret key and has mode 0644: run 'chmod 600"):
        djinn.connect(keyed[0], key=loose, server_key=keys / "server.pub")
    with pytest.raises(RequestError, match="holds no secret key"):
        djinn.connect(keyed[0], key=keys / "alice.pub")
    loose.chmod(0o600)
    with pytest.raises(RequestError, match=r"server\.pub"):
        djinn.connect(keyed[0], key=loose)


def test_ps_takes_a_key(keyed, keys):
    command = [sys.executable, "-m", "djinn_zmq.cli.main", "ps", "--server", keyed[0]]
    done = subprocess.run(
        [*command, "--key", str(keys / "alice.key")],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0 and "tiny" in done.stdout
