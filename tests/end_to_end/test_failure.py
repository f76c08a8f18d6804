"""Whoever dies, the others go on, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import errors
from tests.end_to_end.conftest import until

FRANCE = "the capital of france is"
# A run of it takes a second on one thread. Above 64 KiB pyzmq starts a thread of its own, which stays.
LONG = np.ones((30, 256), int)
WAIT_S = 30.0


DROPS = """
import gc, sys
import djinn_zmq as djinn

def use(endpoint):
    server = djinn.connect(endpoint)
    return server.model("tiny").run("the capital of france is").top(1)[0].token

for _ in range(3):
    print(use(sys.argv[1]), flush=True)
    gc.collect()
"""


@pytest.mark.parametrize("way", ["ipc", "tcp"])
def test_a_client_that_is_dropped_and_not_closed_ends_and_its_process_goes_on(served, way):
    endpoint = served.endpoint if way == "ipc" else served.tcp
    done = subprocess.run(
        [sys.executable, "-c", DROPS, endpoint],
        check=False,
        timeout=WAIT_S,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "paris\n" * 3), done.stderr


CLIENT = """
import sys, numpy as np, djinn_zmq as djinn
server = djinn.connect(sys.argv[1])
tiny = server.model("tiny")
kept = [tiny.run(np.ones((4, 200), int), stop_at=n).checkpoint for n in (1, 2, 3)]
edited = kept[0].resume(hidden=np.asarray(kept[0].hidden), stop_at=1)
print("paused", flush=True)
if sys.argv[2] == "sleep":
    sys.stdin.read()
while True:
    tiny.run(np.ones((48, 256), int), stop_at=4)
"""


@pytest.fixture
def client(served):
    """Start a client program in a process of its own, paused with three checkpoints."""
    started = []

    def start(then: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, served.endpoint, then],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"paused\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def holdings(served):
    """What a server holds, in counts: sessions, checkpoints, bytes, descriptors, processes."""
    with served.connect() as server:
        status = server.status()
    fds = {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in (status.pid, status.engines[0].pid)}
    mapped = {
        pid: sorted(
            line.split(maxsplit=5)[-1]
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if "memfd:djinn" in line
        )
        for pid in fds
    }
    return (
        len(status.sessions),
        status.memory.checkpoints,
        status.memory.used,
        status.memory.arenas,
        fds,
        mapped,
    )


def only_the_link_is_mapped(held):
    """No session, and no client's lane: the engine drops one after the server has closed its session."""
    sessions, *_, maps = held
    lanes = [sum("djinn-lane" in name for name in names) for names in maps.values()]
    return sessions == 0 and lanes == [1] * len(lanes)


def comes_back(served, before) -> None:
    try:
        until(lambda: holdings(served) == before, "all of it comes back")
    except AssertionError:
        assert holdings(served) == before  # says what does not
        raise


def test_a_client_killed_while_paused_leaves_nothing_behind(served, client):
    warm = client("sleep")  # the first one makes the server's pools; what they keep is not a leak
    warm.kill()
    until(lambda: only_the_link_is_mapped(holdings(served)), "the first client's lane ends")
    before = holdings(served)
    process = client("sleep")
    assert holdings(served)[:2] == (1, 4)
    process.kill()
    comes_back(served, before)


def test_a_client_killed_in_mid_run_leaves_nothing_behind(served, client):
    warm = client("sleep")
    warm.kill()
    until(lambda: only_the_link_is_mapped(holdings(served)), "the first client's lane ends")
    before = holdings(served)
    process = client("run")
    until(lambda: _engine_state(served) == "running", "its run is on the way")
    process.kill()
    comes_back(served, before)


def _engine_state(served) -> str:
    with served.connect() as server:
        return server.model("tiny").ping()


def test_a_paused_client_does_not_delay_another(served, client):
    process = client("sleep")
    with served.connect() as server:
        tiny = server.model("tiny")
        for _ in range(5):
            assert tiny.run(FRANCE).top(1)[0].token == "paris"
    assert process.poll() is None


def test_a_ping_and_another_sessions_run_are_served_while_a_long_run_goes_on(served):
    done = []

    def long_run():
        with served.connect() as server:
            server.model("tiny").run(LONG)
            done.append(True)

    with served.connect() as server:
        tiny = server.model("tiny")
        thread = threading.Thread(target=long_run)
        thread.start()
        until(lambda: tiny.ping() == "running", "the long run begins")
        assert tiny.run(FRANCE).top(1)[0].token == "paris"
        assert not done
        thread.join()
        assert tiny.ping() == "idle"


def test_ctrl_c_in_a_run_cancels_the_run_and_the_connection_goes_on(served):
    program = (
        "import sys, numpy as np, djinn_zmq as djinn\n"
        "server = djinn.connect(sys.argv[1]); tiny = server.model('tiny')\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True: tiny.run(np.ones((48, 256), int))\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
        "print(tiny.run('the capital of france is').top(1)[0].token, flush=True)\n"
    )
    with served.connect() as server:
        tiny = server.model("tiny")
        process = subprocess.Popen(
            [sys.executable, "-c", program, served.endpoint], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        until(lambda: tiny.ping() == "running", "its run is on the way")
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "paris\n"
        assert process.wait(WAIT_S) == 0
        process.stdout.close()
        until(lambda: tiny.ping() == "idle", "nothing runs any more")


def test_two_clients_at_once_get_each_their_own_answers(served):
    words = {"france": "paris", "germany": "berlin", "spain": "madrid", "italy": "rome"}
    wrong = []

    def ask(country: str) -> None:
        with served.connect() as server:
            tiny = server.model("tiny")
            for layer in (0, 1, 2, 3, 4) * 3:
                point = tiny.run(f"the capital of {country} is", stop_at=layer).checkpoint
                answer = point.resume().top(1)[0].token
                if answer != words[country]:
                    wrong.append((country, layer, answer))

    threads = [threading.Thread(target=ask, args=(country,)) for country in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_session_is_as_it_was_after_its_client_asked_for_too_much(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        answer = point.resume().logits.tobytes()
        with pytest.raises(errors.DjinnError):
            point.resume([djinn.Add(np.ones((7, 7, 7)))])
        assert point.resume().logits.tobytes() == answer
