"""The engines together, with no process behind them: what is left when one cannot be started."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from djinn_zmq.bus.lane import Lane
from djinn_zmq.bus.lease import pair
from djinn_zmq.bus.link import Link
from djinn_zmq.errors import ArenaFull, Busy, DjinnError, Lost, UnknownModel
from djinn_zmq.memory import files
from djinn_zmq.server.engines import CRASH_WINDOW_S, HELD_LIMIT, Engine
from djinn_zmq.server.fleet import Fleet
from djinn_zmq.server.journal import Journal
from djinn_zmq.server.registry import KeptRecord, Peer, Registry
from djinn_zmq.server.returned import Returned
from djinn_zmq.settings import MIB, Settings
from djinn_zmq.wire import codec, states
from djinn_zmq.wire.attach import Happened, Tell
from djinn_zmq.wire.messages import (
    Adopt,
    Drop,
    Enter,
    Flag,
    Keep,
    Kept,
    Leave,
    Load,
    Loaded,
    ModelInfo,
    Open,
    Ping,
    Progress,
    Ready,
)
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor, inline
from djinn_zmq.wire.tiers import Unclaimed

TINY = ModelInfo("tiny", "tiny", "", 1, 1, 1, 0, 1, 1, "float32", "cpu", False, "")


class NoArenas:
    def retire(self, *_: object, **__: object) -> list[int]:
        return []


def fleet_of(
    registry: Registry,
    reply: Callable[..., None],
    devices: Sequence[str] = ("cpu",),
    **limits: int,
) -> Fleet:
    arenas: Any = NoArenas()
    returned, settings = Returned(None), Settings(**limits)  # type: ignore[arg-type]
    return Fleet(devices, "auto", settings, registry, arenas, Journal(), returned, reply)


def test_a_client_that_goes_while_it_is_answered_is_given_no_further_session() -> None:
    registry, nothing = Registry(9), Any
    peer = Peer(b"i1", nothing, b"1", "a user", True, 0)
    registry.peers[peer.envelope] = peer

    def reply(*_: object) -> None:  # finds it gone
        if not registry.peers:
            return
        registry.peers.clear()
        for number in list(peer.sessions):
            registry.close(registry.sessions[number])

    fleet = fleet_of(registry, reply)
    (engine,) = fleet.engines
    engine.sources["tiny"] = "tiny"
    engine.state = states.Engine.LOADING
    engine.link, ends = Link.create(Settings())
    header = codec.peek(codec.encode(Op.OPEN, Open("tiny"), request=1))
    for _ in range(2):
        fleet.open(peer, header, "tiny", "tiny")
    fleet.on_message(engine, codec.encode(Op.LOAD, Loaded(TINY), flags=Flag.REPLY), ())
    assert not registry.sessions
    ends.close()
    engine.stop(0)


def test_who_waits_for_as_many_sessions_as_he_may_have_waits_for_no_more() -> None:
    nothing = Any
    fleet = fleet_of(Registry(2), lambda *_: None, sessions_limit=2)
    (engine,) = fleet.engines
    engine.state = states.Engine.STARTING
    header = codec.peek(codec.encode(Op.OPEN, Open("tiny"), request=1))
    me, other = (
        Peer(b"t" + name, nothing, name, f"tcp:{name!r}", True, 0) for name in (b"1", b"2")
    )
    fleet.open(me, header, "tiny", "tiny")
    fleet.open(me, header, "small", "small")
    with pytest.raises(Busy, match="2 sessions are waited for: at most 2 for one owner"):
        fleet.open(me, header, "tiny", "tiny")
    fleet.open(other, header, "tiny", "tiny")
    fleet.forget_openings(me)
    fleet.open(me, header, "tiny", "tiny")


def test_an_engine_that_cannot_be_started_again_stays_down_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[bytes] = []
    fleet = fleet_of(Registry(1), lambda _, frame, __: answers.append(frame))
    (engine,) = fleet.engines
    before = len(os.listdir("/proc/self/fd"))
    engine.start()
    os.kill(engine.pid, 9)
    engine.owed[7, 1] = b"i1", codec.peek(codec.encode(Op.PING, Ping(), request=1, session=7))

    def refuses(*_: object) -> None:
        raise ArenaFull("8.0 MiB of shared memory asked, the system has 1.0 MiB free")

    monkeypatch.setattr(Link, "create", refuses)  # what killed it may have left no more
    told = fleet.on_death(engine)
    assert engine.state is states.Engine.FAILED
    # What it owed, over the bus and on lanes, is answered with what is known: no other is on its way.
    (error,) = (codec.error_of(codec.decode(frame, ())) for frame in answers)
    assert str(error) == str(told)
    assert "being started again" not in str(told)
    assert "was killed by signal 9; it cannot be started again: 8.0 MiB" in str(told)
    logged = r"engine 0 \(pid \d+\) was killed by signal 9; it had run for \d+\.\d s"
    assert re.search(logged, caplog.text)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(Lost, match=r"engine 0 is down: .*cannot be started again: 8.0 MiB"):
        fleet.load("tiny", "tiny")
    fleet.stop()


def test_an_engine_that_stayed_down_is_started_once_more_when_it_is_asked_for_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, nothing = Registry(1), Any
    fleet = fleet_of(registry, lambda *_: None)
    (engine,) = fleet.engines
    started: list[int] = []
    fleet.on_start = lambda engine: started.append(engine.pid)
    peer = Peer(b"i1", nothing, b"1", "a user", True, 0)
    session = registry.open(peer, "tiny", 0)
    engine.start()
    engine.sources["tiny"] = "tiny"
    os.kill(engine.pid, 9)

    def refuses(*_: object) -> None:
        raise ArenaFull("8.0 MiB of shared memory asked")

    with monkeypatch.context() as patch:
        patch.setattr(Link, "create", refuses)
        said = str(fleet.on_death(engine))
        assert "ask again in 60 s or later, then it is started once more" in said
        engine.retry_s = 0.0  # the pause is over
        with pytest.raises(Lost) as again:
            engine.pass_on(b"i1", b"", ())
        assert str(again.value) == said  # and the next pause begins
    registry.close(session)
    with pytest.raises(Lost, match="is down"):
        fleet.load("tiny", "tiny")
    assert not started
    engine.retry_s = 0.0
    fleet.load("tiny", "tiny")
    assert engine.state is states.Engine.STARTING
    assert started == [engine.pid]
    held = [codec.peek(frame).op for _, frame, _ in engine._held]
    assert held == [Op.LOAD]  # nothing of a session that has ended before
    fleet.stop()


def test_a_model_that_an_engine_dies_of_while_it_is_loaded_is_not_loaded_when_another_is_asked_for() -> (
    None
):
    registry, answers, nothing = Registry(1), list[bytes](), Any
    fleet = fleet_of(registry, lambda _, frame, __: answers.append(frame))
    (engine,) = fleet.engines
    engine.state = states.Engine.STARTING
    engine.sources["tiny"] = "tiny"
    peer = Peer(b"i1", nothing, b"1", "a user", True, 0)
    registry.open(peer, "tiny", 0)
    header = codec.peek(codec.encode(Op.OPEN, Open("deadly"), request=1))
    fleet.open(peer, header, "deadly", "deadly")
    engine._deaths.extend([time.monotonic()] * Settings().engine_restarts)
    fleet.on_death(engine)
    assert engine.state is states.Engine.FAILED
    (error,) = (codec.error_of(codec.decode(frame, ())) for frame in answers)
    assert isinstance(error, Lost) and "engine 0 is down" in str(
        error
    )  # as who asks a moment later
    assert list(engine.sources) == ["tiny"]  # which somebody has a session of


def test_a_model_of_an_engine_that_stays_down_is_loaded_by_another() -> None:
    fleet = fleet_of(Registry(1), lambda *_: None, devices=["cpu", "cpu"])
    down, other = fleet.engines
    for engine in fleet.engines:
        engine.state = states.Engine.STARTING
    assert fleet.load("tiny", "tiny") is down
    assert fleet.load("small", "small") is other
    down.state = states.Engine.FAILED
    assert fleet.load("tiny", "tiny") is other
    assert list(other.sources) == ["small", "tiny"]


def test_what_waits_for_an_engine_is_bounded_in_bytes_and_smaller_messages_still_pass() -> None:
    engine = Engine(0, "cpu", "auto", Settings())
    engine.state = states.Engine.STARTING
    engine.link, ends = Link.create(Settings())
    frame = codec.encode(Op.PING, Ping(), request=1, session=7)
    bulk = [bytes(MIB)] * 24
    for request in (1, 2):
        engine.forward(b"i1", replace(codec.peek(frame), request=request), frame, bulk)
    refused = r"engine 0 is starting: a message of 24\.0 MiB, 16\.0 MiB free of 64\.0 MiB"
    with pytest.raises(Busy, match=refused):
        engine.forward(b"i2", replace(codec.peek(frame), request=3), frame, bulk)
    assert len(engine.owed) == 2  # it is owed nothing more
    engine.forward(b"i2", replace(codec.peek(frame), request=3), frame, bulk[:15])
    engine.tell(Op.LEAVE, Leave(), session=7)
    engine.bury()  # what waited is gone with it: others may wait
    engine.advance("start")
    engine.forward(b"i2", replace(codec.peek(frame), request=4), frame, bulk)
    ends.close()
    engine.stop(0)


def test_an_engine_that_comes_up_is_told_of_more_checkpoints_than_a_queue_holds_messages() -> None:
    engine = Engine(0, "cpu", "auto", Settings())
    engine.state = states.Engine.STARTING
    engine.link, ends = Link.create(Settings())
    count = HELD_LIMIT + Settings().high_water + 10
    for number in range(count):
        engine.tell(Op.LEAVE, Leave(), session=number)
    frame = codec.encode(Op.PING, Ping(), request=1, session=7)
    engine.forward(b"i1", codec.peek(frame), frame, [bytes(MIB)] * 8)
    engine.on_ready(Ready("cpu", 1, 0))
    theirs = Lane(ends, Settings(), first=False)
    taken = []
    while len(taken) <= count:
        message = theirs.receive()
        if message is None:
            engine.link.lane.flush()  # the engine's bell has told of room
        else:
            taken.append((message[0], codec.peek(message[1]).session))
    assert taken == [(b"", number) for number in range(count)] + [(b"i1", 7)]
    theirs.close()
    engine.stop(0)


def test_engines_that_are_stopped_end_beside_each_other() -> None:
    fleet = fleet_of(Registry(1), lambda *_: None, ("cpu", "cpu"))
    first, second = fleet.engines
    read, write = os.pipe()
    second.lease, theirs = pair()
    first._process = subprocess.Popen(["cat"], stdin=read)  # ends with the second
    second._process = subprocess.Popen(["cat"], stdin=theirs, stdout=write)
    for end in (read, write):
        os.close(end)
    theirs.close()
    for engine in fleet.engines:
        engine.state = states.Engine.READY
    fleet.stop()
    assert [one._process and one._process.returncode for one in fleet.engines] == [0, 0]
    assert {one.state for one in fleet.engines} == {states.Engine.STOPPED}


def test_what_one_process_said_of_its_end_is_not_said_of_the_next_ones() -> None:
    engine = Engine(0, "cpu", "auto", Settings())
    engine.state = states.Engine.READY
    engine.models["tiny"], engine.loading = TINY, "small"
    engine.farewell = "ended itself: its device is broken"
    assert engine.bury()[1].endswith("its device is broken")
    assert not engine.models and engine.loading is None  # they are asked for anew
    engine.advance("start")
    assert engine.bury()[1].endswith("ended with status 0")


def test_an_engine_that_dies_as_often_as_it_may_within_a_minute_is_started_again_and_then_no_more() -> (
    None
):
    engine = Engine(0, "cpu", "auto", Settings(engine_restarts=2))
    engine.state = states.Engine.STARTING
    long_ago = time.monotonic() - CRASH_WINDOW_S - 1.0
    engine._deaths.extend([long_ago, long_ago])
    for _ in range(2):
        engine.bury()
        assert engine.state is states.Engine.DOWN
        engine.advance("start")
    engine.bury()
    assert engine.state is states.Engine.FAILED


def test_who_waits_for_a_model_is_told_of_its_progress_as_often_as_he_said() -> None:
    said: dict[bytes, list[Progress]] = {b"i1": [], b"i2": []}

    def reply(envelope: bytes, frame: bytes, _: object) -> None:
        said[envelope].append(codec.decode(frame).meta)

    registry, nothing = Registry(9), Any
    fleet = fleet_of(registry, reply)
    (engine,) = fleet.engines
    engine.state = states.Engine.STARTING
    for number, credit in ((b"1", 3), (b"2", 0)):
        peer = Peer(b"i" + number, nothing, number, "a user", True, 0)
        frame = codec.encode(Op.OPEN, Open("tiny"), request=1, credit=credit)
        fleet.open(peer, codec.peek(frame), "tiny", "tiny")
    engine.state = states.Engine.READY
    for done in range(5):
        meta = Progress("tiny: weights", done, 5)
        fleet.on_message(engine, codec.encode(Op.LOAD, meta, flags=Flag.PROGRESS), ())
        assert (engine.state, engine.detail) == (states.Engine.LOADING, "tiny: weights")
    told = [(one.stage, one.done) for one in said[b"i1"]]
    assert told == [("tiny: waiting", 0), ("tiny: weights", 0), ("tiny: weights", 1)]
    assert not said[b"i2"]


def test_an_engine_is_told_whether_runs_are_listened_for_when_it_comes_up_and_tells_of_one_in_vain() -> (
    None
):
    registry, nothing = Registry(9), Any
    journal = Journal()
    fleet = fleet_of(registry, lambda *_: None, ("cpu", "cpu"))
    fleet._journal = journal
    up, coming = fleet.engines
    up.state, coming.state = states.Engine.READY, states.Engine.STARTING
    ends = []
    for engine in fleet.engines:
        engine.link, theirs = Link.create(Settings())
        ends.append(Link(Lane(theirs, Settings(), first=False), server=-1))
    fleet.tell_of_runs(True)

    def heard(end: Link) -> list[Any]:
        told = []
        while (frames := end.receive()) is not None:
            told.append(codec.decode(frames[1]).meta)
        return told

    assert (heard(ends[0]), heard(ends[1])) == ([Tell(True)], [])
    ready = codec.encode(Op.READY, Ready("cpu", 4711, 99))
    fleet.on_message(coming, ready, ())
    assert (coming.state, coming.device_memory) == (states.Engine.READY, 99)
    assert heard(ends[1]) == [Tell(True)]
    peer = Peer(b"i1", nothing, b"1", "a user", True, 0)
    session = registry.open(peer, "tiny", 0)
    meta = Happened("stop", "stopped after layer 2", 5)
    stopped = codec.encode(Op.HAPPENED, meta, session=session.id)
    of_another = codec.encode(Op.HAPPENED, meta, session=session.id ^ 2)  # that is closed by now
    fleet.on_message(up, stopped, ())
    for _ in range(9):  # however often, while it says nothing
        fleet.tell_of_runs(False)
        fleet.tell_of_runs(True)
    fleet.tell_of_runs(False)
    assert (heard(ends[0]), heard(ends[1])) == ([], [])
    fleet.on_message(up, of_another, ())
    fleet.on_message(up, of_another, ())
    assert (heard(ends[0]), heard(ends[1])) == ([Tell(False)], [])
    fleet.tell_of_runs(True)
    assert (heard(ends[0]), heard(ends[1])) == ([Tell(True)], [])
    events = journal.after(0, "a user", 9)
    assert [(one.kind, one.session) for one in events if one.kind == "stop"] == [
        ("stop", session.id)
    ]
    assert "engine 1 is ready on cpu, pid 4711" in [one.text for one in events]
    for engine, end in zip(fleet.engines, ends, strict=True):
        end.close()
        engine.stop(0)


def held_for(engine: Engine) -> list[tuple[int, Any]]:
    """The ops and metas of what it will be told when it is up."""
    messages = [codec.decode(frame, buffers) for _, frame, buffers in engine._held]
    return [(message.header.op, message.meta) for message in messages]


def test_who_follows_a_dead_engine_is_told_of_sessions_what_they_keep_and_models_in_that_order() -> (
    None
):
    registry, nothing = Registry(9), Any
    fleet = fleet_of(registry, lambda *_: None)
    (engine,) = fleet.engines
    engine.state, engine.sources["tiny"] = states.Engine.STARTING, "a folder"
    peer = Peer(b"i1", nothing, b"1", "a user", True, 0)
    session = registry.open(peer, "tiny", 0)
    session.info_of_model, session.kv = TINY, 99
    ids = {run: inline(np.full((1, 2), run)) for run in (5, 6)}
    for number, run, layer in ((1, 5, 2), (2, 6, 2), (3, 6, -1), (4, 5, 3)):
        tensor = Tensor("float32", (1, 2, 3), Slot(1, number, 1))
        kept = Kept(number, session.id, run, layer, tensor, tiers=("host",))
        session.kept[number] = KeptRecord(kept, ids[run])
    fleet._restore(engine)
    kepts = {number: record.kept for number, record in session.kept.items()}
    assert list(kepts) == [1, 2, 4] and session.kv == 0  # a reply's logits are over
    facts = tuple(files.facts_of(TINY).items())
    assert held_for(engine) == [
        (Op.ENTER, Enter("a user", "tiny", 0)),
        (Op.ADOPT, Adopt(ids[5], (kepts[1], kepts[4]), facts)),
        (Op.ADOPT, Adopt(ids[6], (kepts[2],), facts)),
        (Op.LOAD, Load("tiny", "a folder", "auto")),
    ]


def test_a_model_that_cannot_be_loaded_is_refused_to_all_who_wait_and_may_be_asked_for_again() -> (
    None
):
    answers: list[DjinnError] = []

    def reply(_: bytes, frame: bytes, __: object) -> None:
        answers.append(codec.error_of(codec.decode(frame)))

    registry, nothing = Registry(9), Any
    fleet = fleet_of(registry, reply)
    (engine,) = fleet.engines
    engine.state = states.Engine.STARTING
    header = codec.peek(codec.encode(Op.OPEN, Open("tiny"), request=1))
    for number in (b"1", b"2"):
        peer = Peer(b"i" + number, nothing, number, "a user", True, 0)
        fleet.open(peer, header, "tiny", "a folder")
    engine.state = states.Engine.LOADING
    load = codec.peek(codec.encode(Op.LOAD, Load("tiny", "a folder", "auto")))
    fleet.on_message(engine, codec.failure(load, UnknownModel("tiny: no such folder")), ())
    assert [(type(one), str(one)) for one in answers] == [
        (UnknownModel, "tiny: no such folder")
    ] * 2
    assert engine.state is states.Engine.READY and not engine.sources and not engine.detail


def test_files_that_no_session_has_yet_take_each_engines_share_of_the_disk() -> None:
    for disk, told in ((1 << 20, [(Op.UNCLAIMED, Unclaimed(51))]), (0, [])):
        fleet = fleet_of(Registry(9), lambda *_: None, ("cpu", "cpu"), disk=disk)
        returned: Any = SimpleNamespace(nbytes=101)
        fleet._returned = returned
        for engine in fleet.engines:
            engine.state = states.Engine.STARTING
            fleet._tell_unclaimed(engine)
            assert held_for(engine) == told


def test_what_is_kept_for_a_session_that_has_ended_meanwhile_is_dropped() -> None:
    fleet = fleet_of(Registry(9), lambda *_: None)
    (engine,) = fleet.engines
    engine.state = states.Engine.STARTING
    tensor = Tensor("float32", (1, 2, 3), Slot(1, 0, 1))
    kepts = tuple(Kept(number, 77, 5, 2, tensor) for number in (1, 2))
    keep = codec.encode(Op.KEEP, Keep(inline(np.zeros((1, 2), np.int64)), kepts), session=77)
    fleet.on_message(engine, keep, ())
    assert held_for(engine) == [(Op.DROP, Drop((1, 2)))]
