"""One death of an engine, seen by all at once: what it costs whom, and what comes back.

An engine takes seconds to start, so all that a death may touch is there when one is killed; the tests
then look at what each got, and go on from what is left.
"""

import asyncio
import io
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import djinn_zmq as djinn
from djinn_zmq import aio, errors
from djinn_zmq.cli.debug import breakpoints, moving
from djinn_zmq.cli.debug.debugger import Debugger
from djinn_zmq.client.forwards import Asked
from tests.end_to_end.conftest import Running, running, until

FRANCE = "the capital of france is"
LONG = np.ones((100, 256), int)  # a run of it takes seconds on one thread
PAST = np.array([[5, 9, 31]])
INSIDE = "layers.2.mlp"
WAIT_S = 30.0
assert breakpoints and moving  # their words register themselves
LATE = r"no answer from .* in 0\.05 s: engine 0 is starting: python .*; give it more time"


@dataclass
class World:
    """What there was before the death, and what was said of it."""

    running: Running
    server: djinn.Server
    tiny: djinn.Model
    pid: int  # of the engine that died
    restarts: int
    logits: bytes  # of FRANCE
    lane: Any  # of `server`, before
    waited: dict[str, Future] = field(default_factory=dict)  # who waited → what it got
    gathered: list[Any] = field(default_factory=list)  # the same of three tasks of one loop
    late: list[str] = field(default_factory=list)  # said of what the next engine is too late for
    pinged: str = ""  # the server's answer meanwhile
    debuggers: dict[str, Debugger] = field(default_factory=dict)  # of `djinn debug`, each attached


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Iterator[World]:
    """A server whose engine is alive, and one client of it."""
    with (
        running(tmp_path_factory.mktemp("mortal") / "s", "--model=tiny") as one,
        one.connect() as server,
    ):
        tiny = server.model("tiny")
        engine = server.status().engines[0]
        whole = tiny.run(FRANCE).logits.tobytes()
        (lane,) = server.connection.lanes
        yield World(one, server, tiny, engine.pid, engine.restarts, whole, lane)


@pytest.fixture(scope="module")
def saved(before) -> dict[int, tuple[djinn.Checkpoint, bytes]]:
    """A checkpoint after each layer, with its bits."""
    kept = before.tiny.run(FRANCE, save_at=range(5)).checkpoints
    return {layer: (kept[layer], bits(kept[layer].hidden.fetch())) for layer in kept}


@pytest.fixture(scope="module")
def inside(before) -> djinn.Checkpoint:
    return before.tiny.run(FRANCE, stop_at=INSIDE).checkpoint


@pytest.fixture(scope="module")
def talk(before) -> tuple[djinn.Session, djinn.Checkpoint, bytes]:
    """A conversation, a checkpoint that needs its past, and that one's bits."""
    session = before.tiny.session()
    point = session.run(FRANCE, stop_at=2).checkpoint
    hidden = bits(point.hidden.fetch())
    session.generate(max_new_tokens=3, ends=()).finish()
    return session, point, hidden


@pytest.fixture(scope="module")
def forward(before):
    return before.tiny.forward(Asked(PAST))


@pytest.fixture(scope="module")
def idle(before) -> Iterator[djinn.Model]:
    """A client with a lane, which waits for nothing."""
    with before.running.connect() as server:
        tiny = server.model("tiny")
        tiny.ping()
        yield tiny


@pytest.fixture(scope="module")
def died(before, saved, inside, talk, forward, idle) -> Iterator[World]:
    """The same world after the death."""
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(5))

        def client(**options) -> djinn.Model:
            return stack.enter_context(before.running.connect(**options)).model("tiny")

        program = client()
        debugger = stack.enter_context(before.running.connect())  # kept by it while it waits
        attached = debugger.attach(program.session_id, stop_at=2)
        before.waited["a run that is held"] = threads.submit(program.run, FRANCE)
        attached.wait(WAIT_S)
        before.waited["its debugger"] = threads.submit(attached.wait, WAIT_S)
        for doing in ("holds a run", "waits"):
            one = stack.enter_context(before.running.connect())
            typed = before.debuggers[doing] = Debugger(one, Console(file=io.StringIO(), width=200))
            program = client()
            assert typed.do("break 2") and typed.do(f"attach {program.session_id:016x}")
            if doing == "holds a run":
                before.waited[f"a run that one {doing}"] = threads.submit(program.run, FRANCE)
                assert typed.do("continue") and typed.point is not None
        before.waited["a run over the lane"] = threads.submit(client().run, LONG)
        until(lambda: before.tiny.ping() == "running", "it is on its way")
        queued = client(lane=False)
        before.waited["a run over the bus"] = threads.submit(queued.run, LONG)
        until(lambda: waits(before.server, queued), "the server owes it an answer")
        asyncio.run(die(before))
        before.pinged = before.server.ping()
        for ask in (
            lambda: saved[0][0].resume(timeout_s=0.05),
            lambda: list(saved[0][0].sweep([[djinn.Scale(2.0)]], timeout_s=0.05)),
        ):
            with pytest.raises(errors.Unreachable) as said:
                ask()
            before.late.append(str(said.value))
        os.kill(before.server.status().engines[0].pid, signal.SIGCONT)
        yield before


def waits(server: djinn.Server, model: djinn.Model) -> bool:
    return any(one.waiting for one in server.sessions() if one.id == model.session_id)


async def die(world: World) -> None:
    """Kill the engine under three runs of one event loop; have the next one stay as it is, starting, and
    ask in every way that has parts for what does not come in time."""

    async def generated() -> None:
        async for _ in session.generate(FRANCE, max_new_tokens=2, timeout_s=0.05):
            pass

    async def traced() -> None:
        async for _ in tiny.trace(FRANCE, "the capital of spain is", timeout_s=0.05):
            pass

    def next_engine() -> int:
        return world.server.status().engines[0].pid

    async with aio.connect(world.running.endpoint) as server:
        tiny = await server.model("tiny")
        session = await tiny.session()
        runs = [asyncio.ensure_future(tiny.run(LONG)) for _ in range(3)]
        await tiny.ping()  # behind them
        os.kill(world.pid, signal.SIGKILL)
        until(lambda: next_engine() not in (0, world.pid), "the death is noticed")
        os.kill(next_engine(), signal.SIGSTOP)
        world.gathered = await asyncio.gather(*runs, return_exceptions=True)
        asked = [tiny.run(FRANCE, timeout_s=0.05), generated(), traced()]
        world.late = [str(one) for one in await asyncio.gather(*asked, return_exceptions=True)]


# ---- who is told


@pytest.mark.parametrize(
    "who", ["a run over the lane", "a run over the bus", "a run that is held", "its debugger"]
)
def test_who_waits_for_an_engine_that_is_killed_is_told_so_and_that_checkpoints_are_kept(died, who):
    with pytest.raises(errors.Lost) as said:
        died.waited[who].result(WAIT_S)
    if who != "its debugger":
        kept = "checkpoints in host memory or on the disk are kept"
        assert re.search(rf"pid {died.pid}\) was killed by signal 9.*, {kept}", str(said.value))


@pytest.mark.parametrize("doing", ["holds a run", "waits"])
def test_a_debugger_whose_engine_is_killed_says_so_once_and_is_attached_no_more(died, doing):
    debugger = died.debuggers[doing]
    assert not debugger.do("continue")
    said = debugger.console.file.getvalue()
    assert re.search(rf"error: .*pid {died.pid}\) was killed by signal 9", said), said
    assert debugger.attached is debugger.point is debugger.stop is None
    assert debugger.do(f"run {FRANCE}") and debugger.point.layer == 2


def test_in_asyncio_code_too_each_that_waits_is_told(died):
    assert [type(one) for one in died.gathered] == [errors.Lost] * 3, died.gathered


def test_what_the_next_engine_is_too_late_for_says_that_it_is_starting(died):
    assert [bool(re.fullmatch(LATE, one)) for one in died.late] == [True] * 5, died.late
    assert died.pinged == "serving"


def test_who_waited_for_nothing_is_not_told_and_goes_on(died, idle):
    assert idle.run(FRANCE).logits.tobytes() == died.logits


# ---- what comes back


def test_checkpoints_outlive_a_killed_engine_and_resume_with_the_same_bits(died, saved):
    for point, rows in saved.values():
        assert bits(point.hidden.fetch()) == rows
        assert point.resume().logits.tobytes() == died.logits
    assert died.server.status().engines[0].restarts == died.restarts + 1


def test_a_stop_inside_a_layer_outlives_its_engine(died, inside):
    assert inside.resume().logits.tobytes() == died.logits


def test_the_next_lane_is_made_by_itself(died):
    lanes = died.server.connection.lanes
    until(lambda: died.tiny.ping() and list(lanes), "there is a lane again")
    assert died.lane.closed and died.lane not in list(lanes)
    assert died.tiny.run(FRANCE).logits.tobytes() == died.logits


def test_the_memory_is_the_next_engines_to_give_back_and_to_use_again(died, saved):
    before = died.server.status().memory.checkpoints
    for point, _ in saved.values():
        point.release()
    assert died.server.status().memory.checkpoints == before - len(saved)
    again = died.tiny.run(FRANCE, stop_at=2).checkpoint
    assert again.resume().logits.tobytes() == died.logits


# ---- what does not


def test_what_needs_a_conversations_past_is_lost_by_name_and_it_can_be_rebuilt(died, talk):
    session, point, hidden = talk
    with pytest.raises(errors.Lost, match="the keys and values of 5 tokens, which died with their"):
        point.resume()
    assert bits(point.hidden.fetch()) == hidden, "what it saved is there all the same"
    with pytest.raises(errors.Lost, match="branch .* is gone"):
        session.run("a")
    assert next(one for one in died.server.sessions() if one.id == session.id).kv == 0
    count = len(session.ids)
    session.rebuild()
    session.run("a")
    assert len(session.ids) == count + 1
    session.close()


def test_a_programs_past_is_lost_by_name_and_its_next_beginning_is_served(died, forward):
    with pytest.raises(errors.Lost, match="branch .* is gone"):
        died.tiny.forward(Asked(PAST, past=forward.past))
    again = died.tiny.forward(Asked(PAST)).outputs["logits"]
    assert again.tobytes() == forward.outputs["logits"].tobytes()


# ---- one too many


def test_an_engine_that_keeps_dying_stays_down_and_says_so(died):
    server = died.server
    while (engine := server.status().engines[0]).state != "failed":
        pid = engine.pid
        os.kill(pid, signal.SIGKILL)
        until(
            lambda pid=pid: (
                server.status().engines[0].pid not in (0, pid)
                or server.status().engines[0].state == "failed"
            ),
            "another engine, or none any more",
        )
    assert "6 times in 60 s" in engine.detail
    with pytest.raises(errors.Lost, match="engine 0 is down: .*6 times in 60 s; ask again in"):
        died.tiny.run(FRANCE)
