"""Calling a served model as transformers' `forward` is called: numpy in and out, the past by name.

What `djinn_zmq.hf` is built on; no torch here.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from djinn_zmq.client.arrays import brought, left_behind
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.connection import Connection
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.session import Session
from djinn_zmq.spans import Spans
from djinn_zmq.wire import forwards as wire
from djinn_zmq.wire.forwards import Crop, Repeat
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Tensor, view


class Past:
    """Keys and values on the server, of what one forward and those before it ran. Immutable.

    Kept there until nothing refers to this object any more.
    """

    def __init__(self, connection: Connection, session: int, number: int, length: int) -> None:
        self.session = session
        self.number = number
        self.length = length  # positions
        self._released = weakref.finalize(self, connection.leftovers.add, session, number)
        self._released.atexit = False


Change = Crop | Repeat | np.ndarray  # an array: the rows, int64 (n,)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call, as `wire.forwards.Forward` has it."""

    ids: np.ndarray  # int64 (batch, positions)
    past: Past | None = None
    changes: Sequence[Change] = ()
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    labels: np.ndarray | None = None
    keep: int | np.ndarray = 0
    cached: bool = True
    hidden: bool = False


@dataclass(slots=True)
class Forwarded:
    """What came of it. outputs: by name; those that are several, as "hidden_states", in a list."""

    kind: str
    outputs: dict[str, Any]
    past: Past | None
    spans: Spans = field(default_factory=Spans)


def forward(session: Session, asked: Asked) -> Operation[Forwarded]:
    """Raises PromptError, RequestError, Lost, NoSessions, ArenaFull."""
    parcel = Parcel(session.connection, session.id)
    try:
        meta = yield from _placed(asked, parcel)
        call = Call(
            Op.FORWARD,
            meta,
            session=session.id,
            buffers=parcel.buffers,
            progress=session.progress,
        )
        reply = yield call
    finally:
        parcel.settle()
    found: wire.Forwarded = reply.meta
    connection = session.connection
    past: Past | None = None
    try:
        if found.past:
            past = Past(connection, session.id, found.past, found.length)
        arrays = [
            left_behind(connection, session.drive, session.id, output.id, output.tensor)
            if output.id
            else np.array(view(output.tensor, reply.buffers))
            for output in found.outputs
        ]
    except BaseException:  # a KeyboardInterrupt: nobody will refer to what was kept
        connection.give_back(reply)
        raise
    outputs: dict[str, Any] = {}
    for output, array in zip(found.outputs, (yield from brought(arrays)), strict=True):
        if output.place < 0:
            outputs[output.name] = array
        else:
            outputs.setdefault(output.name, []).append(array)
    return Forwarded(found.kind, outputs, past, Spans(found.spans))


def _placed(asked: Asked, parcel: Parcel) -> Operation[wire.Forward]:
    def place(array: np.ndarray | None) -> Operation[Tensor | None]:
        return (yield from parcel.place(array)) if array is not None else None

    changes: list[wire.Change] = []
    for change in asked.changes:
        if isinstance(change, np.ndarray):
            rows = yield from parcel.place(change)
            changes.append(wire.Select(rows))
        else:
            changes.append(change)
    ids = yield from parcel.place(asked.ids)
    mask = yield from place(asked.mask)
    positions = yield from place(asked.positions)
    labels = yield from place(asked.labels)
    keep: int | Tensor = 0
    if isinstance(asked.keep, np.ndarray):
        keep = yield from parcel.place(asked.keep)
    else:
        keep = asked.keep
    return wire.Forward(
        asked.past.number if asked.past is not None else 0,
        tuple(changes),
        ids,
        mask,
        positions,
        labels,
        keep,
        asked.cached,
        asked.hidden,
    )


def card(session: Session) -> Operation[tuple[dict[str, bytes], str]]:
    """The files of the model's config and tokenizer, by name; and its attention implementation."""
    reply = yield Call(Op.CARD, wire.Card(), session=session.id, progress=session.progress)
    files = {
        file.name: b"".join(view(piece, reply.buffers).tobytes() for piece in file.pieces)
        for file in reply.meta.files
    }
    return files, reply.meta.attention
