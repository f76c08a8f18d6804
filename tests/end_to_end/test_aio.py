"""The asyncio client: the same face, many waiting at once, and nothing left behind."""

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio
from djinn_zmq.errors import (
    AccessDenied,
    Closed,
    DeadlineExceeded,
    LayerError,
    RequestError,
    UnknownCheckpoint,
    UnknownModel,
    UnknownSession,
    Unreachable,
)

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"
# A run of it takes a second on one thread. Above 64 KiB pyzmq starts a thread of its own, which stays.
LONG = np.ones((30, 256), int)
WAIT_S = 30.0


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def open_files() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass  # the one that listed the directory
    return found


def go(main, *arguments) -> list[dict]:
    """Run *main* in an event loop of its own, and see that it leaves nothing: no task, no open
    file, no warning, nothing never awaited. Returns what the loop's exception handler was told."""
    complaints: list[dict] = []

    async def watched() -> None:
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = WAIT_S
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(2 * WAIT_S):
            await main(*arguments)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    gc.collect()
    before = open_files()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        asyncio.run(watched(), debug=True)
        gc.collect()
    assert [str(one.message) for one in warned] == []
    left = {fd: what for fd, what in open_files().items() if fd not in before}
    assert not left
    return complaints


def quiet(main, *arguments) -> None:
    assert go(main, *arguments) == []


async def until(condition, what: str):
    """Until the awaited *condition* holds; each look at it is an exchange with a server."""
    limit = time.monotonic() + WAIT_S
    while not (found := await condition()):
        assert time.monotonic() < limit, f"not within {WAIT_S:g} s: {what}"
    return found


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(served, request) -> str:
    return served.endpoint if request.param == "ipc" else served.tcp


# ---- the face


def test_everything_of_the_public_face_can_be_awaited_and_gives_what_its_sync_form_does(
    endpoint, tiny
):
    tiny.run(FRANCE, stop_at=2).checkpoint.hidden.fetch()  # the sync client has mapped its memory

    async def main() -> None:
        async with aio.connect(endpoint) as server:
            assert await server.ping() == "serving"
            model = await server.model("tiny")
            assert await model.ping() == "idle"
            assert await model.tokens(FRANCE) == tiny.tokens(FRANCE)
            assert bits(await model.encode(FRANCE)) == bits(tiny.encode(FRANCE))
            mine = [one for one in await server.sessions() if one.id == model.session_id]
            assert [one.yours for one in mine] == [True]
            status = await server.status()
            assert "tiny" in [one.name for one in status.models]

            run = await model.run(FRANCE, stop_at=2)
            same = tiny.run(FRANCE, stop_at=2)
            assert (run.state, run.layer, run.stopped) == ("stopped", 2, True)
            point = run.checkpoint
            assert (point.shape, point.dtype, point.nbytes) == (
                same.checkpoint.shape,
                same.checkpoint.dtype,
                same.checkpoint.nbytes,
            )
            assert bits(await point.hidden[0, -1]) == bits(same.checkpoint.hidden[0, -1])
            assert bits(await point.hidden[:, [3, 1], ::2]) == bits(
                same.checkpoint.hidden[:, [3, 1], ::2]
            )
            whole = await point.hidden.fetch()
            assert bits(whole) == bits(same.checkpoint.hidden.fetch())

            edit = djinn.Add(np.linspace(-1, 1, 64), at=(0, -1))
            done = await point.resume([edit])
            expected = same.checkpoint.resume([edit])
            assert bits(await done.logits) == bits(expected.logits)
            assert await done.top(5) == expected.top(5)
            assert done.spans.total_ns > 0 and "compute" in str(done.spans)
            germany = (await model.run(GERMANY, stop_at=2)).checkpoint
            swapped = await point.resume(hidden=await germany.hidden.fetch())
            assert (await swapped.top(1))[0].token == "berlin"
            patched = await point.resume([djinn.Patch(germany)], logits=3)
            assert (await patched.top(3))[0].token == "berlin"
            saved = await model.run(FRANCE, save_at=[1, 3], logits="all")
            assert sorted(saved.checkpoints) == [1, 3]
            assert bits(await saved.logits) == bits(tiny.run(FRANCE, logits="all").logits)

            await point.release()
            with pytest.raises(UnknownCheckpoint):
                await point.resume()
            await model.close()
            with pytest.raises(UnknownSession):
                await model.ping()
            assert (await server.model("tiny")).session_id != model.session_id

    quiet(main)


def test_connect_may_be_awaited_and_closed_by_hand_and_finds_the_environments_endpoint(
    served, monkeypatch
):
    monkeypatch.setenv("DJINN_ENDPOINT", served.endpoint)

    async def main() -> None:
        server = await aio.connect()
        assert server.welcome.pid == served.process.pid
        model = await server.model("tiny")
        await server.close()
        await server.close()
        for late in (server.ping, lambda: model.run(FRANCE)):
            with pytest.raises(Closed, match="the connection is closed"):
                await late()

    quiet(main)


def test_mistakes_raise_what_their_sync_forms_raise_and_the_connection_goes_on(endpoint):
    async def main() -> None:
        async with aio.connect(endpoint) as server:
            with pytest.raises((UnknownModel, AccessDenied)):
                await server.model("nonsense")
            model = await server.model("tiny")
            with pytest.raises(LayerError, match="layer 5 does not exist"):
                await model.run(FRANCE, stop_at=5)
            run = await model.run(FRANCE, stop_at=1)
            with pytest.raises(IndexError, match="index 9 is out of range"):
                await run.checkpoint.hidden[0, 9]
            with pytest.raises(RequestError, match="stopped after layer 1: resume"):
                await run.logits
            with pytest.raises(ZeroDivisionError):
                async with aio.connect(endpoint) as other:
                    await other.model("tiny")
                    raise ZeroDivisionError
            assert (await (await run.checkpoint.resume()).top(1))[0].token == "paris"

    quiet(main)


def test_numpy_cannot_await_and_says_what_to_write_instead(endpoint):
    async def main() -> None:
        async with aio.connect(endpoint) as server:
            model = await server.model("tiny")
            hidden = (await model.run(FRANCE, stop_at=2)).checkpoint.hidden
            for numpys in (np.asarray, lambda it: np.asarray(it, np.float32), np.sum):
                with pytest.raises(TypeError, match=r"use `await array.fetch\(\)`"):
                    numpys(hidden)
            assert (await hidden.fetch()).shape == (1, 5, 64)
            (prompt,) = hidden  # as many awaitables as it has rows
            assert (await prompt).shape == (5, 64)

    quiet(main)


def test_with_where_async_with_is_meant_says_so_and_an_awaited_connection_has_it_too(served):
    async def main() -> None:
        async with await aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            async with await model.session() as session:
                for one in (server, session):
                    with pytest.raises(TypeError, match="in asyncio code use `async with`"), one:
                        pass
                assert (await session.run(FRANCE)).state == "finished"
        assert server.connection.closed

    quiet(main)


def test_another_event_loop_than_the_connections_own_is_refused_by_name(served):
    async def other(model) -> None:
        with pytest.raises(Closed, match="belongs to the event loop it was made in: connect anew"):
            await model.run(FRANCE)

    async def main() -> None:
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            await asyncio.to_thread(asyncio.run, other(model))
            assert (await model.run(FRANCE)).state == "finished"

    quiet(main)


def test_a_hidden_state_of_several_pieces_comes_and_goes_whole(endpoint, tiny):
    ids = np.random.default_rng(7).integers(0, tiny.vocab_size, (150, 150))
    with djinn.connect(endpoint) as sync:
        here = sync.model("tiny").run(ids, stop_at=0, logits="none").checkpoint
        expected = here.hidden.fetch()
        assert expected.nbytes > 2 * 1024 * 1024
        # pyzmq starts a thread for uploads once in a process, which then stays.
        here.resume(hidden=expected, stop_at=0, logits="none")

    async def main() -> None:
        async with aio.connect(endpoint) as server:
            model = await server.model("tiny")
            point = (await model.run(ids, stop_at=0, logits="none")).checkpoint
            one, other = await asyncio.gather(point.hidden.fetch(), point.hidden[::-1])
            assert bits(one) == bits(expected) == bits(other[::-1])
            one[:, 0] = 2
            again = await point.resume(hidden=one, stop_at=0, logits="none")
            assert bits(await again.checkpoint.hidden.fetch()) == bits(one)

    quiet(main)


# ---- many at once


def test_fifty_resumes_at_once_equal_the_sync_ones(endpoint, tiny):
    vectors = [np.random.default_rng(n).normal(size=64) for n in range(50)]
    point = tiny.run(FRANCE, stop_at=2).checkpoint
    expected = [bits(point.resume([djinn.Add(v, at=(0, -1))]).logits) for v in vectors]
    assert len(set(expected)) == 50

    async def main() -> None:
        async with aio.connect(endpoint) as server:
            model = await server.model("tiny")
            point = (await model.run(FRANCE, stop_at=2)).checkpoint

            async def branch(vector) -> bytes:
                return bits(await (await point.resume([djinn.Add(vector, at=(0, -1))])).logits)

            assert await asyncio.gather(*map(branch, vectors)) == expected
            assert await asyncio.gather(*(server.ping() for _ in range(50))) == ["serving"] * 50

    quiet(main)


def test_tasks_that_ask_for_one_model_at_once_share_one_session(endpoint):
    async def main() -> None:
        async with aio.connect(endpoint) as server:
            before = len(await server.sessions())
            models = await asyncio.gather(*(server.model("tiny") for _ in range(5)))
            assert len({id(model) for model in models}) == 1
            assert len(await server.sessions()) == before + 1
            failed = await asyncio.gather(
                *(server.model("nonsense") for _ in range(3)), return_exceptions=True
            )
            assert [isinstance(one, RequestError) for one in failed] == [True] * 3
        async with aio.connect(endpoint) as server:
            assert len(await server.sessions()) == before

    quiet(main)


def test_two_connections_in_one_loop_do_not_wait_for_each_other(served):
    async def main() -> None:
        async with aio.connect(served.endpoint) as one, aio.connect(served.tcp) as other:
            slow, quick = await one.model("tiny"), await other.model("tiny")
            long = asyncio.create_task(slow.run(LONG, logits="none"))
            assert (await (await quick.run(FRANCE)).top(1))[0].token == "paris"
            assert not long.done()
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long

    quiet(main)


# ---- cancelling


def test_cancelling_a_task_cancels_its_run_and_the_connection_stays_usable(endpoint, server):
    checkpoints = server.status().memory.checkpoints

    async def main() -> None:
        async with aio.connect(endpoint) as client, aio.connect(endpoint) as other:
            model, watcher = await client.model("tiny"), await other.model("tiny")
            short = (await model.run(FRANCE, stop_at=2)).checkpoint
            long = asyncio.create_task(model.run(LONG, save_at=range(5), logits="none"))
            quick = [asyncio.create_task(short.resume()) for _ in range(5)]

            async def state_is(state: str) -> bool:
                return await watcher.ping() == state

            await until(lambda: state_is("running"), "the run is on its way")
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            for run in await asyncio.gather(*quick):  # those beside it are not cancelled
                assert (await run.top(1))[0].token == "paris"
            await until(lambda: state_is("idle"), "the engine gives the run up")
            # Had it run to its end, it would have kept five checkpoints.
            assert (await client.status()).memory.checkpoints == checkpoints + 1
            assert await client.ping() == "serving"
            assert (await (await short.resume()).top(1))[0].token == "paris"

    quiet(main)


def test_cancelling_many_of_many_leaves_the_others_their_answers(endpoint):
    async def main() -> None:
        async with aio.connect(endpoint) as server:
            model = await server.model("tiny")
            point = (await model.run(FRANCE, stop_at=2)).checkpoint
            tasks = [asyncio.create_task(point.resume()) for _ in range(40)]
            await asyncio.sleep(0)  # each has sent its request
            cancelled = {task for task in tasks[::2] if task.cancel()}  # False: done already
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in cancelled)
            logits = {bits(await task.result().logits) for task in tasks if task not in cancelled}
            assert len(logits) == 1
            assert (await (await point.resume()).top(1))[0].token == "paris"

    quiet(main)


def test_cancelling_a_batch_stops_the_engine_and_releases_what_had_come(endpoint, server):
    before = server.status().memory.checkpoints

    async def main() -> None:
        async with aio.connect(endpoint) as client, aio.connect(endpoint) as other:
            model, watcher = await client.model("tiny"), await other.model("tiny")
            # More than are on their way at once, some done when it is cancelled and most not.
            prompts = [[1, 2, 3]] * 3 + [LONG[0].tolist()] * 40
            task = asyncio.create_task(model.batch(prompts, save_at=range(5), logits="none"))

            async def some_are_kept() -> bool:
                return (await other.status()).memory.checkpoints > before

            async def idle() -> bool:
                return await watcher.ping() == "idle"

            await until(some_are_kept, "one of the batch is done")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(idle, "the engine gives up what is left")

            async def released() -> bool:
                await model.ping()  # takes along what nobody refers to
                return (await other.status()).memory.checkpoints == before

            await until(released, "what had come is released")
            again = await model.batch([FRANCE, GERMANY])
            assert [row[0].token for row in await again.top(1)] == ["paris", "berlin"]

    quiet(main)


def test_what_a_cancelled_run_had_kept_already_is_released(endpoint, server):
    before = server.status().memory.checkpoints

    async def main() -> None:
        async with aio.connect(endpoint) as client:
            model = await client.model("tiny")
            # Long enough that it is not done while it is being sent.
            task = asyncio.create_task(model.run(np.ones((8, 256), int), save_at=range(5)))
            await asyncio.sleep(0)
            while server.status().memory.checkpoints < before + 5:
                pass  # its answer is there before this loop looks again
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            async def released() -> bool:
                return (await client.status()).memory.checkpoints == before

            await until(released, "the checkpoints nobody can name are released")

    quiet(main)


def test_a_connection_closed_while_tasks_wait_tells_them_so(endpoint):
    async def main() -> None:
        server = await aio.connect(endpoint)
        model = await server.model("tiny")
        waiting = [asyncio.create_task(model.run(LONG, logits="none")) for _ in range(3)]
        await asyncio.sleep(0)
        await server.close()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            # Over the bus the session is closed first, so the engine may have the first word.
            assert isinstance(answer, Closed) or "session was closed" in str(answer), answer

    quiet(main)


# ---- losses and timeouts


def test_a_run_that_takes_longer_than_its_timeout_is_cancelled_by_name(endpoint):
    async def main() -> None:
        async with aio.connect(endpoint) as server:
            model = await server.model("tiny")
            with pytest.raises(DeadlineExceeded, match="not done within 1 ms"):
                await model.run(np.ones((20, 128), int), logits="none", timeout_s=0.001)
            assert (await (await model.run(FRANCE)).top(1))[0].token == "paris"

    quiet(main)


def test_an_engine_that_does_not_answer_is_unreachable_after_the_timeout(served):
    engine = served.engine_pid()

    async def main() -> None:
        async with aio.connect(served.endpoint) as server:
            model = await server.model("tiny")
            os.kill(engine, signal.SIGSTOP)
            try:
                with pytest.raises(Unreachable, match=r"no answer from .* in 0\.1 s"):
                    await model.run(FRANCE, timeout_s=0.1)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await model.run(FRANCE)
                assert await server.ping() == "serving"  # the server itself is well
            finally:
                os.kill(engine, signal.SIGCONT)
            assert (await (await model.run(FRANCE)).top(1))[0].token == "paris"

    quiet(main)


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:1", "ipc:///nowhere/djinn.sock", "nonsense"])
def test_connecting_to_nobody_fails_and_leaves_nothing_open(where):
    async def main() -> None:
        with pytest.raises((Unreachable, RequestError)):
            await aio.connect(where, timeout_s=0.1)
        with pytest.raises((Unreachable, RequestError)):
            async with aio.connect(where, timeout_s=0.1):
                raise AssertionError("entered without a server")

    quiet(main)


def test_a_progress_function_is_told_and_its_own_failure_stops_nobody(served, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(TINY, folder)
    told = []

    def progress(one) -> None:
        told.append(one.stage)
        raise ZeroDivisionError("the user's own")

    async def main() -> None:
        async with aio.connect(served.endpoint, progress=progress) as server:
            model = await server.model(folder)
            assert (await (await model.run(FRANCE)).top(1))[0].token == "paris"

    complaints = go(main)
    assert any("reading weights" in stage for stage in told)
    assert len(complaints) == len(told)
    assert all(isinstance(one["exception"], ZeroDivisionError) for one in complaints)


def test_the_asyncio_client_needs_no_torch():
    program = "import sys, djinn_zmq.aio; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
