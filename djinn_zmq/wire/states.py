"""What may follow what: the states of a run, a session and an engine, as tables.

Server and engine share these tables; neither writes a state by hand. An event that a state does not
allow is a ProtocolError that names both.
"""

from enum import StrEnum
from typing import TypeVar

from djinn_zmq.errors import ProtocolError


class Run(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    STOPPED = "stopped"  # at its breakpoint; its checkpoint can be resumed any number of times
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Session(StrEnum):
    OPENING = "opening"  # its model is loading
    OPEN = "open"
    KEPT = "kept"  # its client is gone; it may come back until the grace is over
    CLOSED = "closed"


class Engine(StrEnum):
    STARTING = "starting"  # the process is coming up
    READY = "ready"
    LOADING = "loading"  # a model's weights are being read
    DOWN = "down"  # died; a new one is on its way
    FAILED = "failed"  # died too often, or cannot be started; stays down for a while
    STOPPED = "stopped"


S = TypeVar("S", Run, Session, Engine)
Table = dict[S, dict[str, S]]

RUN: Table[Run] = {
    Run.QUEUED: {"start": Run.RUNNING, "cancel": Run.CANCELLED, "fail": Run.FAILED},
    Run.RUNNING: {
        "stop": Run.STOPPED,
        "finish": Run.FINISHED,
        "cancel": Run.CANCELLED,
        "fail": Run.FAILED,
    },
    Run.STOPPED: {},  # a resume is a new run: a branch
    Run.FINISHED: {},
    Run.CANCELLED: {},
    Run.FAILED: {},
}

SESSION: Table[Session] = {
    Session.OPENING: {"loaded": Session.OPEN, "close": Session.CLOSED},
    Session.OPEN: {"leave": Session.KEPT, "close": Session.CLOSED},
    Session.KEPT: {"return": Session.OPEN, "close": Session.CLOSED},
    Session.CLOSED: {},
}

ENGINE: Table[Engine] = {
    Engine.STARTING: {
        "ready": Engine.READY,
        "die": Engine.DOWN,
        "give up": Engine.FAILED,
        "stop": Engine.STOPPED,
    },
    Engine.READY: {
        "load": Engine.LOADING,
        "die": Engine.DOWN,
        "give up": Engine.FAILED,
        "stop": Engine.STOPPED,
    },
    Engine.LOADING: {
        "loaded": Engine.READY,
        "die": Engine.DOWN,
        "give up": Engine.FAILED,
        "stop": Engine.STOPPED,
    },
    Engine.DOWN: {"start": Engine.STARTING, "stop": Engine.STOPPED},
    Engine.FAILED: {"start": Engine.STARTING, "stop": Engine.STOPPED},
    Engine.STOPPED: {},
}


def advance(table: Table[S], state: S, event: str) -> S:
    """The state that follows *state* after *event*. Raises ProtocolError where none does."""
    allowed = table[state]
    following = allowed.get(event)
    if following is None:
        kind = type(state).__name__.lower()
        options = ", ".join(allowed) or "nothing"
        raise ProtocolError(f'a {state} {kind} cannot "{event}": it allows {options}')
    return following
