"""An orderly stop with a state directory: what is kept outlives the server, or is named."""

import os
import signal

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.errors import Closed, Lost
from tests.end_to_end.conftest import Running, free_port, until

FRANCE = "the capital of france is"
BIG = np.ones((8, 256), int)  # half a MiB of hidden state in float32, which a CPU is quicker at


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


def test_a_stop_writes_what_is_kept_as_far_as_the_disk_goes_and_names_the_rest(serve, tmp_path):
    state = tmp_path / "state"
    options = (
        "--model=tiny",
        "--dtype=float32",
        "--host-memory=16",
        f"--state={state}",
        "--disk=2",
    )
    with serve(*options, "--gpu-memory=2", port=free_port()) as running:
        stranger, server = djinn.connect(running.tcp), running.connect(lane=False)
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
        pid = stop(running)
        with pytest.raises(Closed, match="the server stops"):
            tiny.run(FRANCE)
        with pytest.raises(Closed, match="the server stops"):
            running.connect(timeout_s=5)
        server.close()  # and takes nothing with it
        stranger.close()
        os.kill(pid, signal.SIGCONT)
        assert running.process.wait(15) == 0
        words = running.words()
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
    with serve(*options, "--stop-s=60") as running, running.connect() as server:
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
