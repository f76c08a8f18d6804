"""Whose sessions there are, who speaks for them, and what is kept where."""

import os
import time
from typing import Any

import numpy as np
import pytest

from djinn_zmq.errors import Busy, DjinnError, UnknownCheckpoint, UnknownSession
from djinn_zmq.server.registry import KeptRecord, Peer, Registry, Session
from djinn_zmq.wire import states
from djinn_zmq.wire.tensors import File, Slot, Tensor, Where, inline
from djinn_zmq.wire.tiers import Kept

IDS = inline(np.zeros((1, 1), np.int64))


def peer_of(owner: str, route: bytes = b"1") -> Peer:
    nothing: Any = None
    return Peer(b"t" + route, nothing, route, owner, True, None)


def keep(session: Session, number: int, where: Where, layer: int = 2, *tiers: str) -> Kept:
    tensor = Tensor("float32", (1, 2, 3), where)
    kept = Kept(number, session.id, 1, layer, tensor, tiers=tiers)
    session.kept[number] = KeptRecord(kept, IDS)
    return kept


def test_one_owner_has_so_many_sessions_over_all_connections_and_another_his_own() -> None:
    registry = Registry(2)
    first = registry.open(peer_of("me", b"1"), "tiny", 0)
    registry.open(peer_of("me", b"2"), "tiny", 0)
    with pytest.raises(Busy, match="2 sessions are open: at most 2 for one owner"):
        registry.open(peer_of("me", b"3"), "tiny", 0)
    registry.open(peer_of("another"), "tiny", 0)
    registry.close(first)
    registry.open(peer_of("me", b"3"), "tiny", 0)


def test_anothers_session_and_one_that_is_not_there_are_refused_alike() -> None:
    registry = Registry(2)
    number = registry.open(peer_of("me"), "tiny", 0).id
    said = []
    for wanted in (number, number ^ 2):
        with pytest.raises(UnknownSession) as refused:
            registry.session_of(peer_of("another"), wanted)
        said.append(str(refused.value).replace(f"{wanted:016x}", "it"))
    assert said[0] == said[1]


def test_a_session_goes_to_the_connection_its_owner_speaks_from_and_is_no_more_the_others() -> None:
    registry = Registry(2)
    moves: list[tuple[int, bytes]] = []
    registry.on_move = lambda session, peer: moves.append((session.id, peer.route))
    first, second = peer_of("me", b"1"), peer_of("me", b"2")
    session = registry.open(first, "tiny", 0)
    for _ in range(2):
        assert registry.session_of(second, session.id) is session
    assert moves == [(session.id, b"2")]
    assert (first.sessions, second.sessions) == (set(), {session.id})
    registry.close(session)
    assert not second.sessions and not registry.sessions


def test_a_move_that_the_engine_cannot_be_told_of_changes_nothing() -> None:
    registry = Registry(2)
    first, second = peer_of("me", b"1"), peer_of("me", b"2")
    session = registry.open(first, "tiny", 0)

    def refuse(*_: object) -> None:
        raise DjinnError("not now")

    registry.on_move = refuse
    with pytest.raises(DjinnError):
        registry.session_of(second, session.id)
    assert session.peer is first and first.sessions == {session.id} and not second.sessions


def test_a_session_is_overdue_when_its_client_has_not_come_back_in_time() -> None:
    registry = Registry(9)
    peers = [peer_of("me", bytes([number])) for number in range(3)]
    later, soon, back = (registry.open(peer, "tiny", 0) for peer in peers)
    assert registry.due_s == float("inf")
    registry.keep_open(later, 60.0)
    assert time.monotonic() + 50 < registry.due_s == later.closes_s
    registry.keep_open(soon, -1.0)
    registry.keep_open(back, -2.0)
    assert registry.due_s == back.closes_s and later.peer is None
    registry.session_of(peers[2], back.id)
    assert back.state is states.Session.OPEN and back.peer is peers[2]
    assert registry.due_s == soon.closes_s
    assert registry.overdue() == [soon]
    registry.close(soon)
    assert registry.due_s == later.closes_s and registry.overdue() == []
    registry.close(later)
    assert registry.due_s == float("inf")


def test_only_who_has_something_in_an_arena_has() -> None:
    registry = Registry(2)
    mine, others = (registry.open(peer_of(owner), "tiny", 0) for owner in ("me", "another"))
    keep(mine, 1, File(1))
    keep(mine, 2, Slot(5, 0, 1))
    keep(others, 3, Slot(6, 0, 1))
    assert registry.has_in("me", 5) and not registry.has_in("me", 6)
    assert registry.has_in("another", 6) and not registry.has_in("another", 5)


def test_what_has_moved_is_known_where_it_is_as_long_as_it_is_kept() -> None:
    registry = Registry(2)
    session = registry.open(peer_of("me"), "tiny", 0)
    keep(session, 1, Slot(5, 0, 1))
    moved = Kept(1, session.id, 1, 2, Tensor("float32", (1, 2, 3), File(1)), tiers=("disk",))
    assert registry.moved(moved) is session
    assert registry.kept_of(session, 1).kept is moved
    del session.kept[1]
    assert registry.moved(moved) is None
    with pytest.raises(UnknownCheckpoint):
        registry.kept_of(session, 1)
    registry.close(session)
    assert registry.moved(moved) is None


def test_each_tier_of_each_engine_is_told_with_what_is_in_it() -> None:
    registry = Registry(9)
    first, second = (registry.open(peer_of("me"), "tiny", engine) for engine in (0, 1))
    keep(first, 1, Slot(5, 0, 1), 2, "host", "disk")
    keep(first, 2, Slot(5, 1, 1), -1, "host")  # a reply's logits are no checkpoint
    keep(second, 3, File(3), 0, "disk")
    found = registry.tiers((0, 1), lambda engine, tier: 10 * engine + len(tier))
    shown = [(one.engine, one.name, one.limit, one.used, one.checkpoints) for one in found]
    assert shown == [
        (0, "device", 6, 0, 0),
        (0, "host", 4, 48, 1),
        (0, "disk", 4, 24, 1),
        (1, "device", 16, 0, 0),
        (1, "host", 14, 0, 0),
        (1, "disk", 14, 24, 1),
    ]


def test_of_anothers_session_nobody_is_told_what_program_runs_it() -> None:
    registry = Registry(2)
    mine, others = peer_of("me"), peer_of("another")
    mine.process = os.getpid()
    session = registry.open(mine, "tiny", 0)
    session.created_s -= 100.0
    told, hidden = session.info(peer_of("me")), session.info(others)
    assert told.yours and "python" in told.program and told.pid == os.getpid()
    assert not hidden.yours and hidden.program == ""
    assert 100 <= told.age_s < 200
    assert others.program == ""  # nobody knows which it is
    gone = peer_of("me")
    gone.process = 1 << 30
    assert gone.program == ""
    registry.keep_open(session, 60.0)
    assert (session.info(mine).pid, session.info(mine).program) == (0, "")
