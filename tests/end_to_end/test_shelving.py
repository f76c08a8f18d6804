"""More than the device may hold goes on, bit for bit; what is kept at an orderly stop outlives the server,
or is named."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.errors import Closed, Lost
from tests.end_to_end.conftest import Running, free_port, running, until

FRANCE = "the capital of france is"
BIG = np.ones((8, 256), int)  # half a MiB of hidden state in float32, which a CPU is quicker at
OPTIONS = ("--model=tiny", "--dtype=float32", "--host-memory=16", "--disk=2")
SESSIONS, TOKENS = 12, 200


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state") / "djinn"


@pytest.fixture(scope="module")
def served(tmp_path_factory, state) -> Iterator[Running]:
    """A server with little room on the device. The last test stops it."""
    folder = tmp_path_factory.mktemp("served") / "s"
    options = (*OPTIONS, "--gpu-memory=2", f"--state={state}")
    with running(folder, *options, port=free_port()) as one:
        yield one


# ---- conversations whose keys and values are more than the device may hold


def prompt(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 200, TOKENS)


@pytest.fixture
def talks(tiny):
    sessions = [tiny.session() for _ in range(SESSIONS)]
    yield sessions
    for session in sessions:
        session.close()


def test_stopped_conversations_give_way_and_go_on_with_the_same_bits(server, tiny, talks):
    held = [session.run(prompt(n)) for n, session in enumerate(talks)]
    wanted = []
    for n in range(SESSIONS):
        with tiny.session() as alone:
            alone.run(prompt(n))
            wanted.append(alone.run([7, 8, 9]).logits.tobytes())
    for n in reversed(range(SESSIONS)):
        assert talks[n].run([7, 8, 9]).logits.tobytes() == wanted[n], n
    events = [one for one in server.events().so_far() if "keys and values" in one.text]
    out = sum(one.nbytes for one in events if one.kind == "evict")
    back = sum(one.nbytes for one in events if one.kind == "prefetch")
    assert out > 1 << 19 and back > 1 << 18
    del held


def test_a_conversation_stopped_in_a_layer_gives_way_and_goes_on(server, tiny, talks):
    stopped = [session.run(prompt(n), stop_at=3) for n, session in enumerate(talks)]
    for n in (0, 5, SESSIONS - 1):
        wanted = tiny.run(prompt(n)).logits.tobytes()
        assert stopped[n].checkpoint.resume().logits.tobytes() == wanted


def test_a_branch_is_gone_on_from_by_two_at_once_while_others_push(tiny, talks):
    first, other = talks[0], talks[1]
    first.run(prompt(1))
    said = [first.run([5]).logits.tobytes()]
    for n, session in enumerate(talks[2:]):
        session.run(prompt(n))
    other.run(prompt(1))
    assert other.run([5]).logits.tobytes() == said[0]


def test_what_is_closed_gives_its_host_memory_back(server, tiny):
    def host() -> int:
        return server.status().memory.used

    sessions = [tiny.session() for _ in range(SESSIONS)]
    for n, session in enumerate(sessions):
        session.run(prompt(n))
    for session in sessions:
        session.close()
    with tiny.session() as one:
        one.run(prompt(3))
        assert one.run([7]).ids.tolist()
    assert host() == 0


def test_hints_bring_keys_and_values_back_before_they_are_asked_for(server, tiny, talks):
    for n, session in enumerate(talks):
        session.run(prompt(n))
    last = max(event.number for event in server.events().so_far())
    talks[0].back_soon()
    wanted = f"keys and values of session {talks[0].id:016x} are now on the device"
    while not any(event.text == wanted for event in server.events(last).so_far()):
        tiny.ping()
    spans = dict(talks[0].run([7]).spans)
    assert "prefetch" not in spans


# ---- an orderly stop


def numbered(n: int) -> np.ndarray:
    prompt = BIG.copy()
    prompt[:, 0] = n
    return prompt


def stop(running: Running) -> int:
    """Tell it to; when it is about to write, its engine, which is returned, stands still."""
    pid = running.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    running.process.send_signal(signal.SIGTERM)
    until(lambda: "to be written to" in running.words(), "it says what it will write")
    return pid


def test_a_stop_writes_what_is_kept_as_far_as_the_disk_goes_and_names_the_rest(
    served, serve, state
):
    stranger, server = djinn.connect(served.tcp), served.connect(lane=False)
    theirs = stranger.model("tiny").run(FRANCE, stop_at=1).checkpoint
    tiny = server.model("tiny")
    wholes = [tiny.run(numbered(n)).logits.tobytes() for n in range(6)]
    points = [tiny.run(numbered(n), stop_at=2).checkpoint for n in range(6)]
    points[0].evict("disk")  # of the four that fit, one is there already
    view = points[4].hidden.view()
    inside = tiny.run(FRANCE, stop_at="layers.1.mlp").checkpoint
    talk = tiny.session()
    talk.run("ann and tom went out", logits="none")
    needing = talk.run(" . then", stop_at=2).checkpoint
    pid = stop(served)
    with pytest.raises(Closed, match="the server stops"):
        tiny.run(FRANCE)
    with pytest.raises(Closed, match="the server stops"):
        served.connect(timeout_s=5)
    server.close()  # and takes nothing with it
    stranger.close()
    os.kill(pid, signal.SIGCONT)
    assert served.process.wait(15) == 0
    words = served.words()
    kept = [points[n].id for n in (0, 3, 4, 5)]
    assert sorted(int(path.stem, 16) for path in state.iterdir()) == sorted(kept)
    assert f"kept in {state}: 4 checkpoints" in words
    for why, left in (
        ("512.0 KiB of disk asked, 0 B free, limit 2.0 MiB", [points[1], points[2]]),
        ("connections without a key are over with the server", [theirs]),
        ("they are inside a layer", [inside]),
        ("they go on from keys and values", [needing]),
    ):
        line = next(line for line in words.splitlines() if why in line)
        assert f"not kept: {len(left)} checkpoint{'s' * (len(left) > 1)}: {why}" in line
        assert {f"{one.id:x}" for one in left} == set(line.rsplit(": ", 1)[1].split(", "))
    del view
    with serve(*OPTIONS, f"--state={state}", "--stop-s=60") as running, running.connect() as server:
        tiny = server.model("tiny")
        assert sorted(one.id for one in tiny.returned()) == sorted(kept)
        for number, n in zip(kept, (0, 3, 4, 5), strict=True):
            again = tiny.checkpoint(number)
            assert again.resume().logits.tobytes() == wholes[n]
            again.release()
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        pid = stop(running)
        running.process.send_signal(signal.SIGTERM)  # a second time: at once
        line = f"not kept: 1 checkpoint: there was no time: {point.id:x}"
        until(lambda: line in running.words(), "it gives up")
        os.kill(pid, signal.SIGCONT)
        assert running.process.wait(15) == 0
        with pytest.raises((Closed, Lost)):
            point.resume()
