"""Past the server, straight to the engine: the same answers, and the same care."""

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq import aio, errors
from djinn_zmq.bus.lane import CAPACITY, Lane, create
from djinn_zmq.client.calls import Call
from djinn_zmq.server.lanes import LANES_LIMIT
from djinn_zmq.wire import codec, messages, tiers
from djinn_zmq.wire.ops import Op
from tests.end_to_end.conftest import until
from tests.end_to_end.test_bad_input import ask
from tests.end_to_end.test_failure import holdings, only_the_link_is_mapped

FRANCE = "the capital of france is"
LONG = np.ones((48, 256), int)  # a run of it takes about a second on one thread


def lanes_of(server: djinn.Server) -> list:
    return list(server.connection.lanes)


def test_a_client_beside_its_server_takes_the_lane_and_others_the_bus(served):
    answers = []
    for options, count in (({}, 1), ({"lane": False}, 0), ({"shared": False}, 0)):
        with served.connect(**options) as server:
            tiny = server.model("tiny")
            whole = tiny.run(FRANCE, save_at=range(5))
            assert len(lanes_of(server)) == count
            answers.append(whole.logits.tobytes())
            answers += [point.resume().logits.tobytes() for point in whole.checkpoints.values()]
    assert len(set(answers)) == 1


def test_over_tcp_there_is_no_lane(served):
    with djinn.connect(served.tcp) as remote:
        remote.model("tiny").ping()
        assert not lanes_of(remote)


def test_two_sessions_of_one_client_share_a_lane(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        again = server.model(tiny.info.source)  # by its directory: a session of its own
        assert again.session_id != tiny.session_id
        assert again.run(FRANCE).logits.tobytes() == tiny.run(FRANCE).logits.tobytes()
        assert len(lanes_of(server)) == 1


def test_both_ends_ring_ahead_of_what_follows_at_once_and_of_nothing_else(served):
    engine = served.engine_pid()

    def said(process: int | str, fd: int, word: str, base: int) -> int:
        text = Path(f"/proc/{process}/fdinfo/{fd}").read_text()
        return int(re.search(rf"^{word}:\s*([0-9a-f]+)", text, re.MULTILINE)[1], base)

    def rings(bell: int) -> int:
        """How often an eventfd of ours has been rung since the last look: nobody else reads it."""
        try:
            return os.eventfd_read(bell)
        except BlockingIOError:
            return 0

    with served.connect() as server:
        tiny = server.model("tiny")
        tiny.ping()  # makes the lane
        (lane,) = lanes_of(server)
        theirs = said("self", lane.fileno(), "tfd", 10)  # the engine's own number of its eventfd

        def heard() -> int:
            return said(engine, theirs, "eventfd-count", 16)

        until(lambda: heard() == 2, "the ping's have been rung")
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        until(lambda: heard() == 3, "the stop's")
        count = 3
        for ask, ahead in (
            (tiny.ping, 1),
            (lambda: point.resume(stop_at=2), 1),
            (lambda: point.resume(), 0),
            (lambda: tiny.run(FRANCE), 0),
        ):
            rings(lane._their_bell)
            ask()
            assert rings(lane._their_bell) >= 2
            count += 1 + ahead
            until(lambda least=count: heard() >= least, "the answer's")
            assert heard() == count


def test_what_an_engine_keeps_can_be_released_as_soon_as_it_is_told_of(tiny):
    for _ in range(50):
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        point.release()
        with pytest.raises(errors.UnknownCheckpoint, match="may have been released"):
            point.release()
        with pytest.raises(errors.UnknownCheckpoint):
            point.resume()


def test_checkpoints_nobody_refers_to_are_given_back_over_the_lane(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        kept = [tiny.run(FRANCE, stop_at=2).checkpoint for _ in range(5)]
        assert server.status().memory.checkpoints == 5
        del kept
        gc.collect()
        tiny.ping()  # what is sent next takes it along
        until(lambda: server.status().memory.checkpoints == 0, "they are given back")


def test_what_nobody_refers_to_goes_with_the_next_resume_in_one_message(served, monkeypatch):
    with served.connect() as server:
        tiny = server.model("tiny")
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        (lane,) = lanes_of(server)
        send, sent = lane.send, []

        def sending(envelope, frame, buffers):
            sent.append(codec.decode(frame, buffers))
            send(envelope, frame, buffers)

        monkeypatch.setattr(lane, "send", sending)
        for wanted in (2, 3, None):  # at once, as a job, and to its end
            run = point.resume(stop_at=2)
            (number,) = (one.id for one in run.checkpoints.values())
            del run
            gc.collect()
            sent.clear()
            rest = point.resume(stop_at=wanted)
            assert [one.meta.released for one in sent] == [(number,)]
            del rest
            gc.collect()
            tiny.ping()
            until(lambda: server.status().memory.checkpoints == 1, "they are given back")
        assert point.resume().top(1)[0].token == "paris"


def test_a_resume_lets_go_of_nothing_that_is_not_its_sessions_own(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        other = server.model(tiny.info.source)  # by its directory: a session of its own
        point, theirs = (one.run(FRANCE, stop_at=2).checkpoint for one in (tiny, other))
        wanted = messages.Wanted(2, (), "none", 0)
        meta = messages.Resume(point.id, None, (), wanted, (theirs.id, 77))
        ask(server, Op.RESUME, meta, session=tiny.session_id)
        assert theirs.resume().top(1)[0].token == "paris"


ASKER = """
import sys, djinn_zmq as djinn
with djinn.connect(sys.argv[1]) as server:
    tiny = server.model("tiny")
    words = ("paris", "berlin", "rome", "madrid", "france", "germany")
    ids = {word: tiny.encode(word).tolist() for word in words}
    assert len(list(server.connection.lanes)) == 1
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(sys.argv[2])):
        word = words[(number + int(sys.argv[3])) % len(words)]
        assert tiny.encode(word).tolist() == ids[word], (number, word)
    print("all answered", flush=True)
"""


def test_forty_thousand_requests_of_four_clients_at_once_are_neither_lost_nor_mixed(served):
    with subprocess_group(
        [[sys.executable, "-c", ASKER, served.endpoint, "10000", str(n)] for n in range(4)]
    ) as clients:
        for client in clients:
            assert client.stdout.readline() == b"ready\n"
        for client in clients:
            client.stdin.write(b"go\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout.readline() == b"all answered\n"


class subprocess_group:
    def __init__(self, commands):
        self.commands = commands

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.started = [subprocess.Popen(command, **pipes) for command in self.commands]
        return self.started

    def __exit__(self, *_):
        for process in self.started:
            process.kill()
            process.communicate()


def test_many_tasks_wait_on_one_lane_at_once(served):
    async def main():
        async with aio.connect(served.endpoint) as server:
            tiny = await server.model("tiny")
            texts = [FRANCE, "the capital of germany is", "the capital of italy is"] * 10
            runs = await asyncio.gather(*(tiny.run(text, stop_at=2) for text in texts))
            assert len(lanes_of(server)) == 1
            done = await asyncio.gather(*(run.checkpoint.resume() for run in runs))
            return [(await one.top(1))[0].token for one in done]

    assert asyncio.run(main()) == ["paris", "berlin", "rome"] * 10


def test_the_other_end_of_a_lane_is_in_mid_run_when_a_ping_comes(served):
    with served.connect() as one, served.connect() as other:
        mine, theirs = one.model("tiny"), other.model("tiny")
        mine.ping()
        seen = []
        running = threading.Thread(target=lambda: mine.run(LONG))
        running.start()
        until(lambda: seen.append(theirs.ping()) or seen[-1] == "running", "the run is on its way")
        running.join()


def test_lanes_of_clients_that_are_gone_end_though_their_engine_took_no_news(served):
    def offers(server) -> bool:
        """As many lanes as a client may have. False: the engine's queue is full."""
        session = server.connection.drive(opened())
        for _ in range(LANES_LIMIT):
            ends = create(CAPACITY)
            try:
                server.connection.sharing.lease.ask(messages.Offer(session), *ends)
            except errors.Busy as exc:
                assert "takes no news now" in str(exc)
                return False
            finally:
                ends.close()
        return True

    def opened():
        reply = yield Call(Op.OPEN, messages.Open("tiny"))
        return reply.meta.session

    with served.connect() as server:
        server.model("tiny").ping()  # the model is loaded, and its engine answers
    engine = served.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    try:
        while True:
            with served.connect(lane=False) as server:
                if not offers(server):
                    break
        until(lambda: not served.status().sessions, "the server has seen them go")
    finally:
        os.kill(engine, signal.SIGCONT)
    with served.connect() as server:  # a lane is introduced behind all that was told before
        until(lambda: server.model("tiny").ping() and lanes_of(server), "the engine takes news")
    until(lambda: only_the_link_is_mapped(holdings(served)), "they are given up")


def test_device_memory_is_lent_to_the_process_that_asks_for_it_and_no_other(served):
    """What is asked here is refused in any case, and the reason says for whom."""
    with served.connect() as one, served.connect(shared=False) as other:
        tiny = one.model("tiny")
        point = tiny.run(FRANCE, stop_at=2).checkpoint
        assert lanes_of(one)

        def hold():
            yield Call(Op.HOLD, tiers.Hold(point.id, "device", False), session=tiny.session_id)

        for asker, why in ((one, "no device tier"), (other, "shares memory")) * 2:
            with pytest.raises(errors.RequestError, match=why):
                asker.connection.drive(hold())
        assert isinstance(one.connection.lanes.of(tiny.session_id), Lane)
        one.connection.lanes.wanted = False  # the same over the bus
        for asker, why in ((one, "no device tier"), (other, "shares memory")) * 2:
            with pytest.raises(errors.RequestError, match=why):
                asker.connection.drive(hold())


def test_a_run_on_a_lane_is_cancelled_at_its_deadline_and_by_its_task(served):
    with served.connect() as server:
        tiny = server.model("tiny")
        with pytest.raises(errors.DeadlineExceeded):
            tiny.run(np.ones((16, 256), int), timeout_s=0.05)
        assert tiny.run(FRANCE).top(1)[0].token == "paris"

    async def main():
        async with aio.connect(served.endpoint) as server:
            tiny = await server.model("tiny")
            run = asyncio.ensure_future(tiny.run(LONG))
            while await tiny.ping() != "running":
                pass
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            while await tiny.ping() != "idle":
                pass

    asyncio.run(main())


def test_a_client_killed_with_requests_on_its_lane_leaves_nothing_behind(served):
    def killed():
        with subprocess_group([[sys.executable, "-c", FLOOD, served.endpoint]]) as (process,):
            assert process.stdout.readline() == b"on the way\n"

    killed()  # the first one makes the server's pools; what they keep is not a leak
    until(lambda: only_the_link_is_mapped(holdings(served)), "the first client's lane ends")
    before = holdings(served)
    killed()
    until(lambda: holdings(served) == before, "all of it comes back")


FLOOD = """
import sys, numpy as np, djinn_zmq as djinn
from djinn_zmq.client.calls import Call
from djinn_zmq.wire import messages
from djinn_zmq.wire.ops import Op
server = djinn.connect(sys.argv[1])
tiny = server.model("tiny")
point = tiny.run(np.ones((16, 200), int), stop_at=1).checkpoint
wanted = messages.Wanted(4, (2, 3), "none", 0)
for _ in range(20):
    server.connection.send(
        Call(Op.RESUME, messages.Resume(point.id, None, (), wanted), session=tiny.session_id)
    )
print("on the way", flush=True)
sys.stdin.read()
"""


FORKED = """
import os, sys, djinn_zmq as djinn
server = djinn.connect(sys.argv[1])
tiny = server.model("tiny")
point = tiny.run("the capital of france is", stop_at=2).checkpoint
if not os.fork():
    for ask in (point.resume, tiny.ping, server.status):
        try:
            print("asked", ask(), flush=True)
        except djinn.DjinnError as exc:
            print(exc, flush=True)
    server.close()
    sys.stdin.read()
    print("ended", flush=True)
    sys.exit()
os.read(int(sys.argv[2]), 1)
print(point.resume().top(1)[0].token, flush=True)
os.read(int(sys.argv[2]), 1)
"""


def test_a_child_that_was_forked_leaves_the_connection_to_its_parent(served):
    go, gone = os.pipe()
    command = [sys.executable, "-c", FORKED, served.endpoint, str(go)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, pass_fds=[go], **pipes) as parent:
        for _ in range(3):
            assert "belongs to the process that it was forked from" in parent.stdout.readline()
        os.write(gone, b"g")
        assert parent.stdout.readline() == "paris\n"
        parent.kill()
        until(lambda: not served.status().sessions, "its end is seen, though the child lives")
        parent.stdin.close()
        assert parent.stdout.read() == "ended\n"
    os.close(go)
    os.close(gone)
