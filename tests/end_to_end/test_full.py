"""A machine whose host memory is full: who asks for too much is refused, and nobody loses anything."""

from collections.abc import Iterator

import numpy as np
import pytest

from djinn_zmq import errors
from tests.end_to_end.conftest import Running, running
from tests.end_to_end.programs import Program

FRANCE = "the capital of france is"
WAIT_S = 20.0
OPTIONS = ("--host-memory=1", "--dtype=float32")  # which a CPU computes fastest


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Running]:
    """A server that may have 1 MiB of host memory, and has no other tier."""
    with running(tmp_path_factory.mktemp("full") / "s", "--model=tiny", *OPTIONS) as one:
        yield one


def test_a_full_arena_is_refused_with_sizes_and_loses_nothing(server, tiny):
    ids = np.ones((8, 200), int)  # 400 KiB a checkpoint
    first = tiny.run(ids, stop_at=1)
    second = tiny.run(ids, stop_at=2)
    answer = first.checkpoint.resume().logits.tobytes()
    with pytest.raises(
        errors.ArenaFull, match=r"400\.0 KiB of host memory asked, .* limit 1\.0 MiB"
    ):
        tiny.run(ids, save_at=[1, 2, 3])
    assert server.status().memory.checkpoints == 2
    second.checkpoint.release()
    third = tiny.run(ids, stop_at=3)
    assert first.checkpoint.resume().logits.tobytes() == answer
    assert third.checkpoint.resume().logits.tobytes() == answer
    with pytest.raises(errors.ArenaFull):
        tiny.run(np.ones((32, 256), int), stop_at=1)
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_without_room_for_what_is_held_the_debugger_goes_and_the_program_goes_on(served, server):
    one = Program(served.connect())
    try:
        attached = server.attach(one.model.session_id, stop_at=2)
        answer = one.runs(np.ones((20, 256), int), logits=1)
        with pytest.raises(errors.ArenaFull):
            attached.wait(WAIT_S)
        assert answer.result(WAIT_S).state == "finished"
    finally:
        one.close()
