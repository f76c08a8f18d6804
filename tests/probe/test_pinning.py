import os
import subprocess
import sys

import pytest

from djinn_zmq.probe import pinning

# Threads that exist before they are pinned, as those of libzmq do.
THREADS = """
import sys, threading
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process():
    with subprocess.Popen(
        [sys.executable, "-c", THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def test_every_thread_of_a_process_is_pinned_and_it_says_so(process):
    cpu = max(os.sched_getaffinity(0))
    pinned = pinning.pin("servers", [process.pid], [cpu])
    threads = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
    assert len(threads) == 4
    assert all(os.sched_getaffinity(thread) == {cpu} for thread in threads)
    assert str(pinned) == f"servers (1 process, 4 threads) on CPU {cpu}"


def test_what_is_left_alone_says_so_too(process):
    before = os.sched_getaffinity(process.pid)
    pinned = pinning.pin("servers", [process.pid], None)
    assert os.sched_getaffinity(process.pid) == before
    assert str(pinned) == "servers (1 process, 4 threads) not pinned"
    assert pinned.as_json()["cpus"] is None


def test_a_process_that_ended_is_an_error_not_a_silence(process):
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        pinning.pin("servers", [process.pid], [max(os.sched_getaffinity(0))])


def test_the_two_sides_never_share_a_cpu():
    client, servers = pinning.two_sides()
    if len(os.sched_getaffinity(0)) == 1:
        assert client is None and servers is None
    else:
        assert client is not None and servers is not None
        assert not set(client) & set(servers)
