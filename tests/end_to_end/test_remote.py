"""Clients without shared memory: over TCP on the loopback without a key, and over ipc by choice."""

import contextlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.errors import (
    AccessDenied,
    Lost,
    UnknownCheckpoint,
    UnknownSession,
    Unreachable,
)
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
from tests.end_to_end.conftest import free_port, until
from tests.end_to_end.strangers import bits, every_way_into, paused, relay, sessions_of

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
WAIT_S = 30.0
BATCH, POSITIONS = 200, 200  # × 64 × 2 bytes: a hidden state of 5.1 MB, five pieces


@pytest.fixture
def remote(served):
    """A client over tcp, without a key."""
    with djinn.connect(served.tcp) as server:
        yield server


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
    here = tiny.run(ids, stop_at=0, logits="none").checkpoint  # as many bytes as after any layer
    assert here.nbytes > 4 * 1024 * 1024
    endpoint = served.tcp if way == "tcp" else served.endpoint
    with djinn.connect(endpoint, shared=False) as remote:
        far = remote.model("tiny")
        used = server.status().memory.used
        point = far.run(ids, stop_at=0, logits="none").checkpoint
        whole = point.hidden.fetch()
        assert (whole.shape, whole.nbytes) == ((BATCH, POSITIONS, 64), point.nbytes)
        assert bits(whole) == bits(here.hidden)
        assert bits(point.hidden[10:190, 1:, ::2]) == bits(whole[10:190, 1:, ::2])
        assert bits(point.hidden[:, ::-1]) == bits(whole[:, ::-1])
        whole[:, -1] = 0
        for again in (
            point.resume([djinn.Set(whole)], stop_at=0, logits="none").checkpoint,
            point.resume(hidden=whole, stop_at=0, logits="none").checkpoint,
        ):
            assert bits(again.hidden) == bits(whole)
        del again
        point.release()
        far.ping()
        until(lambda: server.status().memory.used <= used, "uploads are given back")


@pytest.mark.parametrize("way", ["tcp", "ipc without shared memory"])
def test_logits_of_several_pieces_come_whole(served, server, tiny, way):
    ids = np.random.default_rng(7).integers(0, tiny.vocab_size, (BATCH // 10, POSITIONS))
    here = tiny.run(ids, stop_at=3).checkpoint
    endpoint = served.tcp if way == "tcp" else served.endpoint
    with djinn.connect(endpoint, shared=False) as remote:
        far = remote.model("tiny")
        used = server.status().memory.used
        point = far.run(ids, stop_at=3).checkpoint
        edited = point.hidden.fetch()
        edited[:, -1] = 0
        mine = here.resume(hidden=edited, logits="all")
        theirs = point.resume(hidden=edited, logits="all")
        assert theirs.logits.nbytes > 1024 * 1024
        assert bits(theirs.logits) == bits(mine.logits)
        del theirs, mine
        point.release()
        far.ping()
        until(lambda: server.status().memory.used <= used, "logits are given back")


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


def test_who_has_no_key_and_whose_connection_is_cut_is_told_that_his_sessions_ended_with_it(served):
    with relay(served.tcp) as (way, cuts), djinn.connect(way) as server:
        tiny = server.model("tiny")
        cuts.set()
        with pytest.raises(Lost, match="was cut, which ends this client's sessions: connect again"):
            tiny.run(FRANCE)
        with pytest.raises(UnknownSession, match="or have ended with its connection"):
            tiny.run(FRANCE)


def test_many_connections_that_end_at_once_are_all_noticed(served, server):
    before = set(sessions_of(server))
    for _ in range(5):
        crowd = subprocess.run([sys.executable, "-c", CROWD, served.tcp], check=False)
        assert crowd.returncode == -signal.SIGKILL  # all of it was open by then
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
    with pytest.raises(
        Unreachable, match="no server answers at tcp://127.0.0.1:1: nobody listens there"
    ):
        djinn.connect("tcp://127.0.0.1:1", timeout_s=0.5)
    assert time.monotonic() - begin < WAIT_S
