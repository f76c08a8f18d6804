"""A machine whose host memory is full: who asks for too much is refused, and nobody loses anything. And
the server killed at last: all who wait are told."""

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from djinn_zmq import aio, errors
from tests.end_to_end.conftest import Running, free_port, running
from tests.end_to_end.programs import Program
from tests.end_to_end.test_aio import quiet

FRANCE = "the capital of france is"
# Above 64 KiB pyzmq starts a thread of its own, which stays.
LONG = np.ones((30, 256), int)
WAIT_S = 20.0
OPTIONS = ("--host-memory=1", "--dtype=float32")  # which a CPU computes fastest


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Running]:
    """A server that may have 1 MiB of host memory, and has no other tier. The last test kills it."""
    folder = tmp_path_factory.mktemp("full") / "s"
    with running(folder, "--model=tiny", *OPTIONS, port=free_port()) as one:
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


# ---- its end


WAITS = """
import sys, numpy as np, djinn_zmq as djinn
with djinn.connect(sys.argv[1]) as server:
    tiny = server.model("tiny")
    for ask in (lambda: tiny.run(np.ones((200, 256), int)), server.ping):
        try:
            ask()
        except djinn.errors.Lost as exc:
            print(exc)
"""


def test_a_killed_server_takes_its_engine_along_and_all_who_wait_get_an_error(served):
    engine = os.pidfd_open(served.engine_pid())
    endpoints = served.endpoint, served.tcp
    program = subprocess.Popen(
        [sys.executable, "-c", WAITS, served.endpoint], stdout=subprocess.PIPE, text=True
    )

    async def main() -> None:
        async with aio.connect(endpoints[0]) as here, aio.connect(endpoints[1]) as there:
            models = [await one.model("tiny") for one in (here, there)]
            while await models[0].ping() != "running":  # the program's
                pass
            # Several of each session: these take turns as sessions do, so none is through long before the others.
            runs = [asyncio.create_task(model.run(LONG)) for model in models * 4]
            await models[0].ping()  # behind them
            served.process.kill()
            answers = await asyncio.gather(*runs, return_exceptions=True)
            for answer, endpoint in zip(answers, endpoints * 4, strict=True):
                assert isinstance(answer, errors.Lost), answer
                assert f"the server at {endpoint} is gone" in str(answer)
            for one in (here, there) * 2:  # and to whoever asks afterwards
                with pytest.raises(errors.Lost, match="is gone"):
                    await one.ping()

    quiet(main)
    said, _ = program.communicate(timeout=WAIT_S)
    gone = f"the server at {served.endpoint} is gone: once it is back, connect again\n"
    assert said == gone * 2
    assert _ended(engine)
    served.process.wait()
    for leftover in served.path.parent.iterdir():
        leftover.unlink()


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        return bool(poll.poll(WAIT_S * 1000))
    finally:
        os.close(pidfd)
