"""The ops: what a message can be about, and how its struct is tagged with that.

A module of its own, so that each family of messages can have one too; `messages` has the tables.
"""

from enum import IntEnum
from typing import Any

Spans = tuple[tuple[str, int], ...]  # (name, nanoseconds), in the order they happened


class Op(IntEnum):
    # client → server
    HELLO = 1
    PING = 2  # to the server; with a session, through it to the session's engine
    STATUS = 3
    OPEN = 4
    CLOSE = 5
    READ = 6
    UPLOAD = 7
    CHUNK = 8  # one way: a piece of an upload
    STOP = 9
    WHERE = 10
    CLAIM = 11
    EVENTS = 12
    # client → server → engine
    MOVE = 13
    HOLD = 14
    AWAY = 15
    RESTORE = 39
    RUN = 16
    RESUME = 17
    RELEASE = 18
    CANCEL = 19
    TOKENS = 20
    LOOK = 21
    SWEEP = 22
    TRACE = 23
    GENERATE = 24  # answered in parts, a token each
    MORE = 25  # one way: the client takes so many more parts of an answer
    CONTINUE = 26  # a run that goes on from a branch of a session
    FORWARD = 56  # a program's own call of the model
    CARD = 57  # the files that make a model's config and tokenizer
    # server ↔ engine
    READY = 32  # engine: the process is up
    LOAD = 33
    ENTER = 34  # server: a session begins
    LEAVE = 35  # server: a session ends
    KEEP = 36  # engine: these tensors now exist
    DROP = 37  # engine: these no longer do
    ADOPT = 38  # server: these survived your predecessor
    HELD = 27  # engine: a session's keys and values take so many bytes
    MOVED = 40  # engine: that tensor is elsewhere now
    UNCLAIMED = 41  # server: so many bytes in the state directory are nobody's
    SHELVE = 42  # server: it stops, give what is kept files
    TELL = 47  # server: somebody listens to what runs begin and stop; or nobody does
    LET_GO = 54  # server: a debugger is gone
    HAPPENED = 55  # engine: an event
    # beside any of them, as a reply
    PROGRESS = 48
    FAILURE = 49
    # a debugger → server → engine
    ATTACH = 50  # answered in parts, a stop each
    BREAKS = 51
    GO_ON = 52
    RUNS = 53  # of a session of the asker's owner; does not take it over


# What the engine of a session answers. The server passes it on, or a lane brings it.
TO_ENGINE = frozenset(
    {Op.RUN, Op.RESUME, Op.CANCEL, Op.TOKENS, Op.LOOK, Op.MORE, Op.CONTINUE, Op.GENERATE}
    | {Op.SWEEP, Op.TRACE, Op.MOVE, Op.HOLD, Op.AWAY, Op.RESTORE}
    | {Op.ATTACH, Op.BREAKS, Op.GO_ON, Op.RUNS, Op.FORWARD, Op.CARD}
)


def message(op: Op, **options: Any) -> dict[str, Any]:
    """The options of the struct that travels under *op*."""
    return {
        "tag": int(op),
        "frozen": True,
        "array_like": True,
        "forbid_unknown_fields": True,
        **options,
    }
