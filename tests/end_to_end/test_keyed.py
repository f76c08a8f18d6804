"""Clients with keys: who gets in over TCP, what is whose, and what a lost connection may come back to."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import djinn_zmq as djinn
from djinn_zmq.cli.main import main
from djinn_zmq.errors import (
    AccessDenied,
    Busy,
    Lost,
    RequestError,
    UnknownCheckpoint,
    UnknownSession,
    Unreachable,
)
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from tests.end_to_end.conftest import free_port, until
from tests.end_to_end.programs import Program, debugger, kill
from tests.end_to_end.strangers import bits, every_way_into, paused, relay, sessions_of

FRANCE = "the capital of france is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"
WAIT_S = 30.0
BATCH, POSITIONS = 200, 200  # × 64 × 2 bytes: a hidden state of 5.1 MB, five pieces


def keys_command(directory: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["keys", *words, "--keys", str(directory)])


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Keys of a server and of alice and bob, who may come in, and of mallory, who may not."""
    directory = tmp_path_factory.mktemp("keys") / "made"
    for name in ("server", "alice", "bob", "mallory"):
        assert keys_command(directory, "new", name).exit_code == 0
    for name in ("alice", "bob"):
        assert keys_command(directory, "allow", str(directory / f"{name}.pub")).exit_code == 0
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
    assert keys_command(tmp_path, "allow", str(keys / "alice.key")).exit_code == 0
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
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr


def test_keys_in_a_directory_that_cannot_be_made_are_refused_in_one_sentence(keys):
    done = keys_command(keys / "more" / "deeper", "new", "carol")
    assert done.exit_code == 0  # parents are made
    (keys / "file").write_text("")
    done = keys_command(keys / "file" / "deeper", "new", "carol")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1), done.stderr


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
        point = far.run(ids, stop_at=0, logits="none").checkpoint
        whole = point.hidden.fetch()
        assert bits(whole) == bits(here.run(ids, stop_at=0, logits="none").checkpoint.hidden)
        whole[0] = 1
        again = point.resume(hidden=whole, stop_at=0, logits="none").checkpoint
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
        Unreachable,
        match="no server answers at tcp://.*ended the connection; check the endpoint and the key",
    ):
        djinn.connect(tcp, timeout_s=300.0, **options)
    with djinn.connect(ipc) as owner:
        assert all(one.owner.startswith("uid:") for one in owner.sessions())


def test_a_key_that_is_allowed_while_the_server_runs_gets_in_and_a_removed_one_no_more(keyed, keys):
    tcp, _ = keyed
    assert keys_command(keys, "new", "carol").exit_code == 0
    carol = keys / "carol.key"
    with pytest.raises(Unreachable):
        djinn.connect(tcp, key=carol, timeout_s=300.0)
    assert keys_command(keys, "allow", str(keys / "carol.pub")).exit_code == 0
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


def test_a_key_whose_connection_is_cut_is_told_to_ask_again_and_goes_on_where_it_was(keyed, keys):
    tcp, _ = keyed
    with relay(tcp) as (way, cuts), djinn.connect(way, key=keys / "alice.key") as server:
        point = server.model("tiny").run(FRANCE, stop_at=2).checkpoint
        whole = bits(point.resume().logits)
        cuts.set()
        with pytest.raises(Lost, match="or the connection to it was cut: ask again"):
            point.resume()
        assert bits(point.resume().logits) == whole


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


def test_the_same_key_may_attach_to_a_program_and_another_may_not(keyed, keys):
    tcp, ipc = keyed
    alice, bob = keys / "alice.key", keys / "bob.key"
    one = Program(djinn.connect(tcp, key=alice))
    try:
        number = one.model.session_id
        for options in ({"endpoint": tcp, "key": bob}, {"endpoint": ipc}):
            with djinn.connect(**options) as stranger:
                with pytest.raises(UnknownSession):
                    stranger.attach(number)
                with pytest.raises(UnknownSession):
                    stranger.runs(number)
        process = debugger(tcp, number, alice)
        assert process.stdout.readline() == "attached\n"
        answer = one.runs()
        assert "held after layer 2" in process.stdout.readline()
        kill(process)
        assert answer.result(WAIT_S).top(1)[0].token == "paris"
        with djinn.connect(tcp, key=alice) as other:  # its number is free again
            until(lambda: _attaches(other, number), "attached again")
    finally:
        one.close()


def _attaches(server: djinn.Server, number: int) -> bool:
    try:
        server.attach(number).detach()
    except Busy:
        return False
    return True


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
