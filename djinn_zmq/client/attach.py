"""Attached to another program's session: its runs stop here, and go on when they are let.

    with server.attach(session, stop_at=2) as attached:
        stop = attached.wait()                       # the program's next run, held after layer 2
        print(stop.checkpoint.lens())
        stop.continue_(edits=[djinn.Add(vector, at=(0, -1))])

The program sees nothing but time. When this ends, whatever way, all that is held goes on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.arrays import read_only
from djinn_zmq.client.blocks import AsyncBlock, Block
from djinn_zmq.client.calls import Call, Next, Operation
from djinn_zmq.client.edits import Edit
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.parts import OVER, Parts
from djinn_zmq.client.run import Checkpoint
from djinn_zmq.client.stops import breaks_of
from djinn_zmq.client.talk import Session
from djinn_zmq.errors import Closed, DjinnError
from djinn_zmq.wire import attach as wire
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.messages import Flag, SessionInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import view

WINDOW = 64  # stops that may be under way at once


class Stop:
    """A run of the program's, held: look at `checkpoint`, then `continue_`.

    kind: "run", "resume", "generate". layer: layers executed. place: the path of the module it is
    held at; "" between two layers. step: of a generation, else None. ids: the forward's own tokens,
    int64 (batch, positions). before: the conversation's before these, int64 (positions,).
    Neither is to be written into. checkpoint: what flows there; all looks work on it, and its `resume`
    is a branch of its own, of which the program learns nothing. held: is it still?
    """

    def __init__(self, attached: "Attached", message: Message) -> None:
        meta: wire.Stopped = message.meta
        self._attached = attached
        self.number: int = meta.number
        self.kind: str = meta.kind
        self.request: int = meta.request
        self.run: int = meta.run
        self.layer: int = meta.layer
        self.step: int | None = None if meta.step < 0 else meta.step
        self.ids = read_only(np.array(view(meta.ids, message.buffers)))
        self.before = read_only(np.array(view(meta.before, message.buffers))[0])
        self.held = True
        points: dict[int, Checkpoint] = {}
        for kept in meta.checkpoints:
            base = points.get(kept.base)
            point = Checkpoint(attached.session, kept, self.ids, base, before=self.before)
            points[kept.id] = point
        self.checkpoint: Checkpoint = points[meta.checkpoints[-1].id]
        self.place: str = self.checkpoint.place

    def continue_(self, edits: Sequence[Edit] | Edit = (), *, hidden: Any = None) -> Any:
        """Let it go on, with *edits*, or with *hidden* in the value's place first.

        Raises EditError, and it is still held; UnknownStop where its program gave it up meanwhile.
        """
        return self._attached.session.drive(self._continue(edits, hidden))

    def _continue(self, edits: Sequence[Edit] | Edit, hidden: Any) -> Operation[None]:
        session = self._attached.session
        if self._attached.over:
            raise Closed(f"not attached any more: {self._attached.reason}")
        parcel = Parcel(session.connection, session.id)
        try:
            placed, on_wire = yield from self.checkpoint._carry(edits, hidden, parcel)
            meta = wire.GoOn(self.number, placed, on_wire)
            yield Call(Op.GO_ON, meta, session=session.id, buffers=parcel.buffers)
        finally:
            parcel.settle()
        self.held = False

    def __repr__(self) -> str:
        where = f"at {self.place}" if self.place else f"after layer {self.layer}"
        step = "" if self.step is None else f", step {self.step}"
        return f"<stop {self.number}: a {self.kind} held {where}{step}>"


class Attached(Block, AsyncBlock, Parts[Stop, wire.Detached]):
    """A session of another program's that is attached to: iterate for its stops, or `wait`.

    target: the session. session: this debugger's own, on the same model; what is kept at stops is
    of that. passed: kinds of requests that came and do not stop ("sweep", "trace"). over: is it?
    reason: why.
    """

    def __init__(self, session: Session, target: SessionInfo, stop_at: Any) -> None:
        super().__init__(session, _asking(session.id, target.id, stop_at))
        self.session = session
        self.connection = session.connection
        self.target = target
        self.passed: list[str] = []
        self.reason = ""

    @property
    def over(self) -> bool:
        return self._over

    def wait(self, timeout_s: float | None = None) -> Any:
        """The next stop; None where there is none within *timeout_s* seconds, or it is over."""
        if timeout_s is not None and not (checks.is_whole(timeout_s) and timeout_s == 0):
            timeout_s = checks.seconds("timeout_s", timeout_s, "a number of seconds, or None")
        return self._session.drive(self._wait(timeout_s))

    def _wait(self, timeout_s: float | None) -> Operation[Stop | None]:
        stop = yield from self._next(timeout_s)
        return None if stop is OVER else stop

    def breaks(self, *stops: Any) -> Any:
        """Stop at these from now on, and at no others: numbers, paths, `Break`s. None: nowhere.

        What is under way stops at those that are still ahead of it. Raises LayerError, StopError; then
        all is as before.
        """
        return self._session.drive(self._set_breaks(stops))

    def _set_breaks(self, stops: Sequence[Any]) -> Operation[None]:
        if self._over or self._request is None:
            raise Closed(f"not attached any more: {self.reason or 'it was closed'}")
        flat = [
            one for some in stops for one in (some if isinstance(some, (list, tuple)) else [some])
        ]
        meta = wire.Breaks(self._request, breaks_of(flat))
        yield Call(Op.BREAKS, meta, session=self.session.id)

    def detach(self) -> Any:
        """Leave the program alone: all that is held goes on as it is."""
        return self.close()

    # ---- the operation

    def _begin(self) -> Operation[None]:
        """Attach. Raises what the engine refuses with."""
        try:
            yield from self._next(None, begins=True)
        except DjinnError:
            yield from self._close()
            raise
        except BaseException:  # a KeyboardInterrupt: nothing can be asked any more
            self.session.drop()
            raise

    def _step(self) -> Operation[Any]:
        return (yield from self._next(None))

    def _next(self, timeout_s: float | None, *, begins: bool = False) -> Operation[Any]:
        if self._over:
            return OVER
        self._enter()
        try:
            if self._request is None:
                call = yield from self._ask
                self._send(call)
            while True:
                message = yield Next(self._request, timeout_s)
                if message is None:
                    return None
                if not message.header.flags & Flag.PART:
                    self.result = yield from self._end(message)
                    self._over = True
                    return OVER
                if message.meta.number:
                    return Stop(self, message)
                if message.meta.kind == wire.BEGUN:
                    if begins:
                        return None
                else:
                    self.passed.append(message.meta.kind)
        except BaseException as exc:
            self._over = True
            self.reason = self.reason or str(exc)
            raise
        finally:
            self._awaited = False

    def _end(self, message: Message) -> Operation[wire.Detached]:
        self.reason = message.meta.reason
        return message.meta
        yield

    def _close(self) -> Operation[None]:
        if not self._over:
            self._over, self.reason = True, "detached"
            if self._request is not None:
                self._session.connection.abandon(self._request)
        yield from self.session.end()

    def __repr__(self) -> str:
        state = f", over: {self.reason}" if self._over else ""
        return f"<attached to session {self.target.id:016x} on {self.target.model}{state}>"


def _asking(session: int, target: int, stop_at: Any) -> Operation[Call]:
    meta = wire.Attach(target, breaks_of(stop_at))
    return Call(Op.ATTACH, meta, session=session, parts=WINDOW)
    yield
