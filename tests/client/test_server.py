"""The end of a client's connection."""

from types import SimpleNamespace
from typing import Any

import pytest

from djinn_zmq.client.calls import Call
from djinn_zmq.client.server import Server
from djinn_zmq.errors import Busy, Closed, DjinnError, Lost, RunError, UnknownSession, Unreachable

SESSIONS = [11, 12, 13, 14]  # of models, and of conversations


class Asked:
    """A connection without shared memory: says what was asked to be closed, and refuses some."""

    def __init__(self, refused: dict[int, DjinnError]) -> None:
        self.refused, self.sessions, self.closed = refused, list[int](), False
        self.sharing = SimpleNamespace(lease=None)

    def close(self) -> None:
        self.closed = True

    def drive(self, operation: Any) -> None:
        call = next(operation, None)
        while call is not None:
            self.sessions.append(call.session)
            try:
                error = self.refused.get(call.session)
                call = operation.send(None) if error is None else operation.throw(error)
            except StopIteration:
                return


class Talk:
    def __init__(self, session: int) -> None:
        self.session = session

    def end(self) -> Any:
        yield Call(None, None, session=self.session)  # type: ignore[arg-type]


def closing(refused: dict[int, DjinnError]) -> tuple[Asked, DjinnError | None]:
    asked = Asked(refused)
    server = Server(asked, asked.drive, None)  # type: ignore[arg-type]
    server._models = {str(one): SimpleNamespace(session_id=one) for one in SESSIONS[:2]}  # type: ignore[misc]
    talks = [Talk(one) for one in SESSIONS[2:]]
    server.conversations.update(talks)  # type: ignore[arg-type]
    try:
        server.close()
    except DjinnError as exc:
        return asked, exc
    return asked, None


def test_who_closes_ends_all_sessions_whichever_fails_and_is_told_of_the_first_that_did() -> None:
    failed = RunError("the server failed")
    for refused, said in (
        ({}, None),
        ({11: UnknownSession("it has ended")}, None),
        ({11: failed, 13: RunError("another")}, failed),
        ({12: UnknownSession("it has ended"), 14: failed}, failed),
    ):
        asked, error = closing(refused)
        assert sorted(asked.sessions) == SESSIONS and asked.closed
        assert error is said


@pytest.mark.parametrize("kind", [Busy, Closed, Lost, Unreachable])
def test_who_closes_waits_once_for_a_server_that_is_gone_and_says_nothing(kind: type) -> None:
    asked, error = closing({12: kind("gone")})
    assert asked.sessions == [11, 12] and asked.closed and error is None
