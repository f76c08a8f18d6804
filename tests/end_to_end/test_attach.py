"""A second client stops what a program runs, looks, edits, and lets it go on."""

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio, errors
from djinn_zmq.client.calls import LOOK_S
from tests.end_to_end.programs import Program, debugger, kill

FRANCE, GERMANY = "the capital of france is", "the capital of germany is"
STORY = "ann and tom went out . then ann gave a drink to"
PLACES = ["embedding", 0, 2, "layers.2.self_attn", "layers.2.mlp", 3, "norm"]
WAIT_S = 20.0


@pytest.fixture(params=["lane", "bus", "frames"])
def program(served, request):
    options = {"bus": {"lane": False}, "frames": {"shared": False}}
    one = Program(served.connect(**options.get(request.param, {})))
    yield one
    one.close()


@pytest.fixture
def alone(served):
    """The same, in one way: where the way makes no difference."""
    one = Program(served.connect())
    yield one
    one.close()


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def stops_of(attached, count: int) -> list:
    """Let each go on as it is."""
    found = []
    for _ in range(count):
        stop = attached.wait(WAIT_S)
        found.append((stop.place or stop.layer, bits(stop.checkpoint.hidden)))
        stop.continue_()
    return found


def test_a_run_is_held_at_each_breakpoint_and_comes_out_with_the_same_bits(program, server, tiny):
    whole = tiny.run(FRANCE, save_at=PLACES)
    with server.attach(program.model.session_id, stop_at=PLACES) as attached:
        answer = program.runs()
        seen = stops_of(attached, len(PLACES))
        done = answer.result(WAIT_S)
    assert seen == [(at, bits(whole.checkpoints[at].hidden)) for at in PLACES]
    assert bits(done.logits) == bits(whole.logits)
    assert done.spans["held"] > 0
    assert bits(program.model.run(FRANCE).logits) == bits(whole.logits)  # nobody is attached now


@pytest.mark.parametrize("at", [2, "layers.1.mlp", "layers.1.self_attn.heads", "norm"])
def test_what_a_debugger_changes_is_what_a_resume_with_the_same_edits_gives(
    alone, server, tiny, at
):
    point = tiny.run(FRANCE, stop_at=at).checkpoint
    edits = [djinn.Scale(0.0, at=(0, -2)), djinn.Add(0.5, at=(0, 1))]
    array = (np.asarray(point.hidden).astype(np.float32) * 2).astype(point.dtype)
    with server.attach(alone.model.session_id, stop_at=at) as attached:
        for options in ({"edits": edits}, {"hidden": array}, {"edits": edits, "hidden": array}):
            answer = alone.runs()
            stop = attached.wait(WAIT_S)
            assert (stop.kind, stop.place or stop.layer) == ("run", at)
            assert bits(stop.checkpoint.resume(**options).logits) == bits(
                point.resume(**options).logits
            )
            stop.continue_(**options)
            assert bits(answer.result(WAIT_S).logits) == bits(point.resume(**options).logits)


def test_edits_at_several_places_of_one_layer_all_count(alone, server, tiny):
    places = ["layers.1.self_attn", "layers.1.mlp.input", "layers.1.mlp", 2]
    edit = djinn.Scale(1.5)
    point = tiny.run(FRANCE, stop_at=places[0]).checkpoint
    for at in places[1:]:
        point = point.resume(edit, stop_at=at).checkpoint
    with server.attach(alone.model.session_id, stop_at=places) as attached:
        answer = alone.runs()
        for _ in places:
            stop = attached.wait(WAIT_S)
            branch = stop.checkpoint.resume(edit)
            stop.continue_(edit)
        assert bits(answer.result(WAIT_S).logits) == bits(point.resume(edit).logits)
        assert bits(branch.logits) == bits(point.resume(edit).logits)


def test_all_looks_work_on_what_is_held(alone, server, tiny):
    other = tiny.run(GERMANY, stop_at=2).checkpoint
    whole = tiny.run(FRANCE, save_at="all")
    with server.attach(alone.model.session_id, stop_at=2) as attached:
        answer = alone.runs()
        stop = attached.wait(WAIT_S)
        point, same = stop.checkpoint, whole.checkpoints[2]
        assert list(stop.ids[0]) == list(whole.ids[0]) and stop.before.size == 0
        assert point.top(3) == same.top(3)
        assert np.array_equal(point.norms(), same.norms())
        assert np.array_equal(point.attention(), same.attention())
        assert point.diff(same).same_bits and not point.diff(other).same_bits
        assert point.lens()[2, 4] == whole.lens()[2, 4]
        (run,) = server.runs(alone.model.session_id)
        assert (run.kind, run.state, run.layer, run.positions) == ("run", "held", 2, 5)
        assert run.stop == stop.number and run.age_s > 0
        stop.continue_(djinn.Patch(other, at=(0, 3)))
        assert answer.result(WAIT_S).top(1)[0].token == "berlin"


def test_a_generation_is_held_in_any_step_and_goes_on_with_the_same_bits(program, server, tiny):
    with tiny.session() as session:
        plain = list(session.generate(STORY, 4, ends=(), logits="last"))
    theirs = program.model.session()
    with theirs, server.attach(theirs, stop_at=[1, "layers.2.mlp"]) as attached:
        answer = program.does(lambda: list(theirs.generate(STORY, 4, ends=(), logits="last")))
        for step in range(4):
            for at in (1, "layers.2.mlp"):
                stop = attached.wait(WAIT_S)
                assert (stop.kind, stop.step) == ("generate", step)
                assert (stop.place or stop.layer) == at
                stop.continue_()
        said = answer.result(WAIT_S)
    assert [token.id for token in said] == [token.id for token in plain]
    assert [bits(token.logits) for token in said] == [bits(token.logits) for token in plain]


@pytest.mark.parametrize("static", [0, 64])
@pytest.mark.parametrize("at", [2, "layers.1.self_attn"])
def test_an_edit_in_a_step_of_a_generation_is_what_a_resume_there_gives(
    alone, server, tiny, at, static
):
    edit = djinn.Scale(-1.0)
    with tiny.session(static=static) as session:
        stopped = session.generate(STORY, 4, stop_at=at, steps=2, ends=())
        begun = [token.id for token in stopped]
        rest = stopped.resume(edit)
        expected = begun + [token.id for token in rest]
    theirs, there = alone.model.session(static=static), djinn.Break(at, when=djinn.Step(2))
    with theirs, server.attach(theirs, stop_at=there) as attached:
        answer = alone.does(lambda: [token.id for token in theirs.generate(STORY, 4, ends=())])
        stop = attached.wait(WAIT_S)
        assert stop.step == 2
        assert list(stop.before[-1:]) == [begun[0]] and list(stop.ids[0]) == [begun[1]]
        assert [t.id for t in stop.checkpoint.generate(2, [edit], ends=())] == expected[2:]
        stop.continue_(edit)
        assert answer.result(WAIT_S) == expected


def test_a_run_in_a_conversation_and_a_resume_are_held_too(alone, server, tiny):
    with tiny.session() as session:
        session.run(STORY)
        plain = session.run(FRANCE, stop_at=1)
        here, whole = bits(plain.checkpoint.hidden), bits(plain.checkpoint.resume().logits)
    with alone.model.session() as theirs:
        theirs.run(STORY)
        with server.attach(theirs, stop_at=[1, 3]) as attached:
            answer = alone.does(theirs.run, FRANCE, stop_at=1)
            stop = attached.wait(WAIT_S)
            assert (stop.kind, stop.layer, len(stop.before)) == ("run", 1, 12)
            assert bits(stop.checkpoint.hidden) == here
            stop.continue_()
            point = answer.result(WAIT_S).checkpoint
            answer = alone.does(point.resume)
            stop = attached.wait(WAIT_S)
            assert (stop.kind, stop.layer) == ("resume", 3)  # 1 lies where it began
            stop.continue_()
            assert bits(answer.result(WAIT_S).logits) == whole


def test_breakpoints_can_change_while_a_run_is_held(alone, server):
    with server.attach(alone.model.session_id, stop_at=1) as attached:
        answer = alone.runs()
        stop = attached.wait(WAIT_S)
        attached.breaks("layers.2.mlp", djinn.Break(when=djinn.Norm(">", 0.0)))
        stop.continue_()
        assert [at for at, _ in stops_of(attached, 4)] == [2, "layers.2.mlp", 3, 4]
        answer.result(WAIT_S)
        with pytest.raises(errors.LayerError):
            attached.breaks(9)
        with pytest.raises(errors.StopError):
            attached.breaks("layers.1.no_such")
        attached.breaks()
        alone.runs().result(WAIT_S)
        assert attached.wait(0.01) is None and not attached.over


def test_the_prompts_of_a_batch_are_held_each_by_itself(alone, server, tiny):
    prompts = [FRANCE, GERMANY, STORY]
    plain = tiny.batch(prompts)
    with server.attach(alone.model.session_id, stop_at=2) as attached:
        answer = alone.does(alone.model.batch, prompts)
        stops = [attached.wait(WAIT_S) for _ in prompts]
        assert sorted(stop.ids.shape[1] for stop in stops) == [5, 5, 12]
        for stop in reversed(stops):
            stop.continue_()
        done = answer.result(WAIT_S)
    assert [bits(run.logits) for run in done] == [bits(run.logits) for run in plain]


def test_what_does_not_stop_passes_and_is_named(alone, server, tiny):
    point = alone.model.run(FRANCE, stop_at=1).checkpoint
    with server.attach(alone.model.session_id, stop_at=2) as attached:
        done = alone.does(lambda: list(point.sweep([[djinn.Scale(0.0)], []]))).result(WAIT_S)
        assert len(done) == 2
        alone.does(lambda: alone.model.trace(FRANCE, GERMANY).finish()).result(WAIT_S)
        answer = alone.runs()
        attached.wait(WAIT_S).continue_()
        answer.result(WAIT_S)
        assert attached.passed == ["sweep", "trace"]


def test_a_deadline_stands_still_while_its_run_is_held(program, server):
    with server.attach(program.model.session_id, stop_at=2) as attached:
        answer = program.runs(timeout_s=0.5)
        stop = attached.wait(WAIT_S)
        assert (
            attached.wait(0.5 + 3 * LOOK_S) is None and not answer.done()
        )  # time that does not count
        stop.continue_()
        assert answer.result(WAIT_S).state == "finished"


def test_a_program_that_gives_up_takes_its_run_away_from_the_debugger(alone, server):
    async def gives_up(endpoint: str) -> None:
        async with aio.connect(endpoint) as theirs:
            model = await theirs.model("tiny")
            async with await server_of(theirs, model) as attached:
                run = asyncio.ensure_future(model.run(FRANCE, timeout_s=5))
                stop = await attached.wait(WAIT_S)
                assert await attached.wait(0.01) is None
                run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await run
                with pytest.raises(errors.UnknownStop):
                    await stop.continue_()
                run = asyncio.ensure_future(model.run(FRANCE))
                async for stop in attached:
                    await stop.continue_(djinn.Scale(1.0))
                    break
                assert (await run).state == "finished"

    async def server_of(theirs, model):
        return await theirs.attach(model, stop_at=2)

    asyncio.run(gives_up(server.connection.endpoint))


def test_refusals_leave_program_and_debugger_as_they_were(alone, server, served):
    model = alone.model
    with pytest.raises(errors.UnknownSession):
        server.attach(12345)
    with pytest.raises(errors.RequestError):
        server.attach("tiny")
    with pytest.raises(errors.LayerError):
        server.attach(model.session_id, stop_at=99)
    with pytest.raises(errors.StopError):
        server.attach(model.session_id, stop_at=djinn.Break(when=djinn.Norm("<", 0)))
    count = len(server.sessions())
    with server.attach(model.session_id, stop_at=["embedding", 2]) as attached:
        with pytest.raises(errors.Busy):
            server.attach(model.session_id)
        answer = alone.runs()
        stop = attached.wait(WAIT_S)
        with pytest.raises(errors.EditError, match="edited at 0"):
            stop.continue_(djinn.Scale(2.0))
        stop.continue_()
        stop = attached.wait(WAIT_S)
        for edits in (djinn.Add(np.ones(3)), djinn.Scale(2.0, at=(0, 99)), djinn.Skip(3)):
            with pytest.raises(errors.EditError):
                stop.continue_(edits)
        with pytest.raises(errors.EditError):
            stop.continue_(hidden=np.ones((1, 1, 64), stop.checkpoint.dtype))
        assert server.runs(model.session_id)[0].state == "held"
        stop.continue_()
        with pytest.raises(errors.UnknownStop):
            stop.continue_()
        assert answer.result(WAIT_S).state == "finished"
    with pytest.raises(errors.Closed):
        stop.continue_()
    with pytest.raises(errors.Closed):
        attached.breaks(1)
    assert len(server.sessions()) == count


def test_detaching_lets_all_that_is_held_go_on(alone, server, tiny):
    with server.attach(alone.model.session_id, stop_at=2) as attached:
        answer = alone.does(alone.model.batch, [FRANCE, GERMANY])
        attached.wait(WAIT_S)
        attached.wait(WAIT_S)
    plain = [bits(tiny.run(prompt).logits) for prompt in (FRANCE, GERMANY)]
    assert [bits(run.logits) for run in answer.result(WAIT_S)] == plain


def test_an_attachment_is_over_with_its_session(alone, server):
    other = alone.model.session()
    attached = server.attach(other, stop_at=2)
    other.close()
    assert attached.wait(WAIT_S) is None
    assert attached.over and attached.reason == "its session was closed"
    assert list(attached) == []
    attached.detach()


def test_sessions_name_the_program_behind_them(alone, server):
    mine = next(one for one in server.sessions() if one.id == alone.model.session_id)
    assert mine.pid == os.getpid() and "python" in mine.program


def test_a_program_goes_on_when_its_debugger_is_killed(program, tiny):
    process = debugger(program.server.connection.endpoint, program.model.session_id)
    assert process.stdout.readline() == "attached\n"
    answer = program.runs()
    assert "held after layer 2" in process.stdout.readline()
    assert not answer.done()
    kill(process)
    assert bits(answer.result(WAIT_S).logits) == bits(tiny.run(FRANCE).logits)


STRANGER = """
import os, sys, djinn_zmq as djinn
from djinn_zmq import errors
os.setgid(65534); os.setuid(65534)
with djinn.connect(sys.argv[1]) as server:
    number = int(sys.argv[2])
    (theirs,) = [one for one in server.sessions() if one.id == number]
    print(theirs.yours, repr(theirs.program))
    for ask in (server.attach, server.runs):
        try:
            ask(number)
        except errors.UnknownSession as exc:
            print("refused")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a second user")
def test_another_user_over_ipc_cannot_attach(served, tiny):
    command = [sys.executable, "-c", STRANGER, served.endpoint, str(tiny.session_id)]
    shut = subprocess.run(command, check=False, capture_output=True, text=True, timeout=WAIT_S)
    assert "Unreachable" in shut.stderr  # the socket's directory is its user's alone
    opened = {served.path.parent.parent: 0o711, served.path.parent: 0o711, served.path: 0o777}
    modes = {path: path.stat().st_mode for path in opened}
    try:
        for path, mode in opened.items():
            path.chmod(mode)
        asked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=WAIT_S)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert asked.stdout == "False ''\nrefused\nrefused\n", asked.stderr


def test_who_gives_up_attaching_gets_his_own_error_and_leaves_no_session(
    alone, served, server, tiny, monkeypatch
):
    before = {one.id for one in server.sessions()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server.connection, "_wait_part", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.attach(alone.model.session_id, stop_at=2)
    server.ping()  # behind what is said of the session

    async def main() -> None:
        async with aio.connect(served.endpoint) as client:
            asked = asyncio.Event()

            async def part(*_):
                asked.set()
                await asyncio.Event().wait()  # for ever: the true one may be there at once

            with monkeypatch.context() as patch:
                patch.setattr(client.connection, "_part", part)
                attaching = asyncio.create_task(client.attach(alone.model.session_id, stop_at=2))
                await asked.wait()
                attaching.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await attaching
            await client.ping()
            assert {one.id for one in await client.sessions()} == before

    asyncio.run(main())
    assert alone.runs().result(WAIT_S).state == "finished"


def test_who_waits_for_a_stop_beside_another_is_refused_and_the_other_gets_it(alone, served):
    async def main() -> None:
        async with (
            aio.connect(served.endpoint) as client,
            await client.attach(alone.model.session_id, stop_at=2) as attached,
        ):
            first = asyncio.create_task(attached.wait())
            await asyncio.sleep(0)
            with pytest.raises(errors.Busy, match="awaited already"):
                await attached.wait()
            answer = alone.runs()
            await (await first).continue_()
            assert not attached.over
        assert answer.result(WAIT_S).state == "finished"

    asyncio.run(main())
