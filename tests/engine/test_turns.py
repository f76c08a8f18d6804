"""Who gets the next turn; and who gets none because its client takes no more parts."""

import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

from djinn_zmq.engine.jobs.job import EngineSession, Job, Part
from djinn_zmq.engine.turns import HEAD_START_NS, Active, Turns
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.codec import MAGIC, Header
from djinn_zmq.wire.messages import Progress

PART = Part(Progress("part", 0, 0))
HALT: Any = object()


def active(session: EngineSession, *, deadline_ms: int = 0, age_s: float = 0.0) -> Active:
    watch = Stopwatch(time.perf_counter_ns() - int(age_s * 1e9))
    nothing: Any = None
    job = Job(session, nothing, nothing, 0, nothing, False, watch)
    turns: Iterator[None] = iter(())
    return Active(job, turns, b"", Header(MAGIC, 1, 16, 0, 0, 1, session.id, deadline_ms, 0))


@pytest.fixture
def one() -> EngineSession:
    return EngineSession(1, "me", "it")


@pytest.fixture
def other() -> EngineSession:
    return EngineSession(2, "you", "it")


def test_a_job_whose_part_waits_for_its_client_gets_no_turn(one, other) -> None:
    turns, paused, working = Turns(), active(one), active(other)
    turns.add(paused)
    turns.add(working)
    paused.held = PART
    other.worked_ns = 10**12  # and though the other is far ahead of it
    assert turns.next() is working
    turns.remove(working)
    assert not turns and turns.until_s() is None
    paused.held = None
    assert turns.until_s() == 0 and turns.next() is paused


def test_a_paused_jobs_deadline_comes_all_the_same(one) -> None:
    turns, paused = Turns(), active(one, deadline_ms=60_000)
    turns.add(paused)
    paused.held = PART
    assert not turns and 59 < turns.until_s() <= 60
    turns.remove(paused)
    late = active(one, deadline_ms=1_000, age_s=2.0)
    late.held = PART
    turns.add(late)
    assert turns and turns.until_s() == 0 and turns.next() is late


def test_a_session_keeps_no_time_from_its_pause(one, other) -> None:
    turns, paused, working = Turns(), active(one), active(other)
    turns.add(paused)
    turns.add(working)
    paused.held = PART
    turns.worked(working, 10 * HEAD_START_NS)
    turns.welcome(one)
    assert one.worked_ns == 9 * HEAD_START_NS


def test_a_deadline_that_is_weeks_away_is_not_waited_for_longer_than_epoll_can(one) -> None:
    turns, paused = Turns(), active(one, deadline_ms=2**32 - 1)
    turns.add(paused)
    paused.held = PART
    wait_s = turns.until_s()
    with select.epoll() as epoll, socket.socket() as closed:  # never asleep: it is ready at once
        epoll.register(closed, select.EPOLLHUP)
        assert epoll.poll(wait_s)


def test_a_session_that_comes_when_nobody_works_brings_no_time_from_before(one, other) -> None:
    turns, long, mine, again = Turns(), active(other), active(one), active(other)
    turns.add(long)
    turns.worked(long, 10**12)
    turns.remove(long)
    turns.add(mine)
    turns.add(again)  # though its session has had a quarter of an hour before
    assert turns.next() is mine
    turns.worked(mine, 1)
    assert turns.next() is again


def test_a_job_that_a_debugger_holds_gets_no_turn_and_its_time_stands_still(one) -> None:
    turns, held = Turns(), active(one, deadline_ms=60_000)
    turns.add(held)
    held.halt = HALT
    assert not turns and turns.until_s() is None and held.left_s == float("inf")
    held.job.watch = Stopwatch(time.perf_counter_ns() - 1002 * 10**9)
    held.halt, held.held_ns = None, 1000 * 10**9
    assert turns and 30 < held.left_s <= 58  # what it was held for does not count


def test_jobs_of_one_session_take_turns_and_are_found_by_it(one, other) -> None:
    turns, jobs, others = Turns(), [active(one) for _ in range(3)], active(other)
    for job in (*jobs, others):
        turns.add(job)
    turns.worked(others, HEAD_START_NS)
    seen = []
    for _ in range(6):
        seen.append(turns.next())
        turns.worked(seen[-1], 1)
    assert seen == 2 * jobs
    assert set(turns.of(one)) == set(turns.of(one.id)) == set(jobs) and turns.of(3) == []
    turns.remove(jobs[0])
    turns.worked(jobs[0], 1)  # it has ended in that turn: it does not come back
    assert set(turns.of(one)) == set(jobs[1:])


def test_a_session_that_comes_gets_its_turn_soon_and_not_all_that_it_missed(one, other) -> None:
    turns, working = Turns(), active(other)
    turns.add(working)
    turns.worked(working, 10 * HEAD_START_NS)
    turns.add(active(one))
    assert one.worked_ns == 9 * HEAD_START_NS
    turns.worked(turns.next(), HEAD_START_NS // 2)
    turns.add(active(one))  # one more of who is there takes no head start anew
    assert one.worked_ns == 9 * HEAD_START_NS + HEAD_START_NS // 2
    turns.worked(working, 10 * HEAD_START_NS)
    turns.add(active(one))
    assert one.worked_ns == 9 * HEAD_START_NS + HEAD_START_NS // 2
