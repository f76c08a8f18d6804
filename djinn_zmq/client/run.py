"""Runs and their checkpoints."""

import time
import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.arrays import RemoteArray, read_only
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.edits import Edit, placed_edits
from djinn_zmq.client.looks import Looks, Top, row_of
from djinn_zmq.client.marks import Mark
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.session import Session
from djinn_zmq.client.sharing import on_device
from djinn_zmq.client.stops import Logits, wanted_of
from djinn_zmq.client.tiers import Tiered
from djinn_zmq.errors import (
    DjinnError,
    EditError,
    LayerError,
    ProtocolError,
    RequestError,
    Unreachable,
)
from djinn_zmq.spans import Spans
from djinn_zmq.wire import messages
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.edits import Edit as WireEdit
from djinn_zmq.wire.messages import Kept, RunReply
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import DTYPES, Device, Tensor, view

if TYPE_CHECKING:
    from djinn_zmq.client.sweep import Sweep

NO_IDS = np.zeros(0, np.int64)
_base_of = attrgetter("base")
RESUME = Op.RESUME  # looked up once: with each request it costs 9 us where that is cold


class Checkpoint(Looks, Tiered):
    """What was saved at a stop: immutable, resumable any number of times.

    id: its number on the server. layer: layers executed before it (0: the embedding's output).
    place: the path of the module it is at; "" between two layers. shape: (batch, positions,
    hidden_size), or as the module has it. dtype, nbytes: of the hidden state.
    It is kept on the server until `release`, or until nothing refers to this object any more.
    """

    _held = False  # of one that was never made whole, by copy.deepcopy for one: it holds nothing

    def __init__(
        self,
        session: Session,
        kept: Kept,
        ids: np.ndarray,
        base: "Checkpoint | None" = None,
        previous: "Checkpoint | None" = None,
        before: np.ndarray = NO_IDS,
    ) -> None:
        """ids: its run's, int64 (batch, positions). base: for one inside a layer, that layer's
        input, kept as long as this. previous: the one before it on its way. before: the tokens of
        its conversation before its run's own, int64 (positions,)."""
        self._session = session
        self._kept = kept
        self._held = True
        self._ids = ids
        self._base = base
        self._previous = previous
        self._before = before
        self.id: int = kept.id
        self.layer: int = kept.layer

    # Not a weakref.finalize: every stop and every resume makes a checkpoint, and that costs 3 us.
    def __del__(self) -> None:
        if self._held:
            self._session.connection.leftovers.add(self._kept.session, self._kept.id)

    def __copy__(self) -> "Checkpoint":
        """Itself, as of anything immutable: the end of a second one would release both."""
        return self

    @property
    def place(self) -> str:
        return self._kept.place

    @property
    def shape(self) -> tuple[int, ...]:
        return self._kept.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self._kept.tensor.dtype]

    @property
    def nbytes(self) -> int:
        return self._kept.tensor.nbytes

    @property
    def ids(self) -> np.ndarray:
        """The tokens that its forward works on: int64 (batch, positions), not to be written into."""
        return read_only(self._ids)

    @property
    def before(self) -> np.ndarray:
        """The tokens of its conversation before these: int64 (positions,), not to be written into."""
        return read_only(self._before)

    @property
    def hidden(self) -> RemoteArray:
        """The hidden state, read when indexed: (batch, positions, hidden_size)."""
        return self._remote()

    def resume(
        self,
        edits: Sequence[Edit] | Edit = (),
        *,
        hidden: Any = None,
        stop_at: Any = None,
        save_at: Any = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> "Run":
        """Go on from here: a new branch; this checkpoint stays as it is.

        edits: made in order before the model goes on; a `Skip` leaves out a layer further on.
        hidden: an array of this checkpoint's shape and dtype in its place, before the edits. The
        rest as in `Model.run`, layers counted from the model's start.
        Raises UnknownCheckpoint, LayerError, StopError, EditError; Lost where the engine died
        meanwhile (a checkpoint with a host copy outlives that: resume again).
        """
        depth = self._session.model.num_layers
        wanted = wanted_of(stop_at, save_at, logits, self.layer, depth, self.place)
        return self._session.drive(self._resume(edits, hidden, wanted, timeout_s))

    def _resume(
        self,
        edits: Sequence[Edit] | Edit,
        hidden: Any,
        wanted: messages.Wanted,
        timeout_s: float | None,
    ) -> Operation["Run"]:
        session = self._session
        parcel = Parcel(session.connection, self._kept.session, timeout_s)
        placed: Tensor | None = None
        on_wire: tuple[WireEdit, ...] = ()
        released: tuple[int, ...] = ()
        try:
            none = isinstance(edits, (tuple, list)) and not edits
            if hidden is not None or not none:
                stays = wanted.stop_at == self.layer and none and not wanted.save_at
                placed, on_wire = yield from self._carry(edits, hidden, parcel, to_keep=stays)
            released = session.connection.released_beside(session.id)
            meta = messages.Resume(self.id, placed, on_wire, wanted, released)
            run = yield from ask(session, RESUME, meta, parcel, timeout_s, self, self._before)
            released = ()
            if placed is not None and type(placed.where) is Device:
                spare = run._message.meta.spare
                session.connection.sharing.cuda().restock(hidden, placed, spare)
            session.stand_at(run)
            return run
        except Unreachable:  # the engine may still come to it
            raise
        except DjinnError:
            if placed is not None and type(placed.where) is Device:
                session.connection.sharing.cuda().restock(hidden, placed, None)
            raise
        finally:
            parcel.settle()
            for number in released:  # perhaps nobody has heard of it; to say it twice does no harm
                session.connection.leftovers.add(session.id, number)

    def sweep(
        self,
        branches: Iterable[Sequence[Edit] | Edit],
        *,
        logits: Any = "last",
        tokens: Any = None,
        memory: int | None = None,
        timeout_s: float | None = None,
    ) -> "Sweep":
        """Many branches, each with its own edits, run as batches: iterate over what it gives.

        logits: of each branch's last position: "last": all, "none", or how many of the likeliest.
        tokens: texts or ids whose logits are wanted besides. memory: bytes that one batch may take; by
        default what the engine thinks right. Outcomes are those of one resume a branch up to the
        rounding of a batch of another shape.
        Raises, when iterated, EditError naming the branch, SweepTooLarge, and what `resume` raises.
        """
        from djinn_zmq.client.sweep import Sweep, memory_of  # on first use

        memory = memory_of(memory)
        return Sweep(self._session, self, branches, logits, tokens, memory, timeout_s)

    def generate(
        self,
        max_new_tokens: int | None = None,
        edits: Sequence[Edit] = (),
        *,
        hidden: Any = None,
        **more: Any,
    ) -> Any:
        """Go on from here, in a session: the rest of this forward, then token by token.

        edits, hidden: as in `resume`. The rest as in `Session.generate`.
        """
        return self._session.generate_from(self, max_new_tokens, edits, hidden, **more)

    @property
    def history(self) -> list["Checkpoint"]:
        """The checkpoints on the way here that are still kept, oldest first, this one last.

        They are kept as long as this one is referred to, or until they are released.
        """
        found: list[Checkpoint] = []
        point: Checkpoint | None = self
        while point is not None:
            if point.kept:
                found.append(point)
            point = point._previous
        return found[::-1]

    @property
    def position(self) -> int:
        """Tokens of its conversation up to here, its own forward's included."""
        return len(self._before) + self._ids.shape[1]

    @property
    def kept(self) -> bool:
        """False once it was released."""
        return self._held

    def release(self) -> Any:
        """Give its memory back now. Resuming it afterwards raises UnknownCheckpoint."""
        return self._session.drive(self._release())

    def _release(self) -> Operation[None]:
        self._held = False
        self._base = None  # others inside the same layer may still need it
        meta = messages.Release((self.id,))
        yield Call(Op.RELEASE, meta, session=self._kept.session)

    def __repr__(self) -> str:
        tier = self._kept.tiers[0]  # when it was last heard of
        where = f"at {self.place}" if self.place else f"after layer {self.layer}"
        return f"<checkpoint {where}: {self.dtype} {self.shape}, {tier}>"

    def _carry(
        self, edits: Sequence[Edit] | Edit, hidden: Any, parcel: Parcel, *, to_keep: bool = False
    ) -> Operation[tuple[Tensor | None, tuple[WireEdit, ...]]]:
        """Edits and a hidden state in its place, as they travel with *parcel*. to_keep: the hidden
        state becomes a checkpoint as it is."""
        on_wire: tuple[WireEdit, ...] = ()
        if not isinstance(edits, tuple) or edits:
            on_wire = yield from placed_edits(edits, parcel, self._kept.tensor.dtype)
        if hidden is None:
            return None, on_wire
        placed = self._session.connection.sharing.given(hidden) or self._on_device(hidden, to_keep)
        if placed is None:
            placed = yield from parcel.place(as_hidden(hidden, self.dtype))
        return placed, on_wire

    def _on_device(self, hidden: Any, to_keep: bool) -> Tensor | None:
        """How a tensor of `writable_cuda` travels; None for what is not on a GPU."""
        if not on_device(hidden):
            return None
        placed = self._session.connection.sharing.cuda().sent(hidden, to_keep=to_keep)
        if placed is None:
            raise EditError(
                "a CUDA tensor that is not one of writable_cuda(), whole: edit one of these in "
                "place, or give an array in host memory"
            )
        return placed


class Run:
    """What a run came to: finished with logits, or stopped at a layer with a checkpoint.

    state: "finished" or "stopped". layer: layers executed. checkpoints: by layer, or by path inside of
    one: those of `save_at` and the stop's own, in the order in which the run came to them.
    """

    mark: Mark | None = None
    _logits: np.ndarray | None = None

    def __init__(
        self,
        session: Session,
        call: Call,
        message: Message,
        begin_ns: int,
        previous: Checkpoint | None = None,
        before: np.ndarray = NO_IDS,
    ) -> None:
        """message: what *call* was answered with, which was begun at *begin_ns*. previous: the
        checkpoint it was resumed from, or that came before it; its own are the next steps on that
        way. before: the tokens of its conversation before its own, int64 (positions,)."""
        reply: RunReply = message.meta
        self._session = session
        self._message = message
        self.id: int = reply.run
        self.state: str = reply.state
        self.layer: int = reply.layer
        if reply.ids is not None:
            self._ids = np.array(view(reply.ids, message.buffers))
        elif previous is not None:
            self._ids = previous._ids
        else:
            raise ProtocolError("a run that begins at its tokens was answered without them")
        self.checkpoints = along(session, reply.checkpoints, self._ids, previous, before)
        if reply.branch:
            last = list(self.checkpoints.values())[-1] if self.checkpoints else previous
            ids = np.concatenate([before, self._ids[0]])
            self.mark = Mark(session.connection, session.id, reply.branch, ids, last)
        if reply.logits_id:
            release = weakref.finalize(
                self, session.connection.leftovers.add, session.id, reply.logits_id
            )
            release.atexit = False
        self._instants = begin_ns, call.sent_ns, call.arrived_ns, time.perf_counter_ns()

    @property
    def ids(self) -> np.ndarray:
        """The prompt: int64 (batch, positions), not to be written into: `torch.tensor` copies it."""
        return read_only(self._ids)

    @property
    def spans(self) -> Spans:
        """Where the time went; print it."""
        begin_ns, sent_ns, arrived_ns, made_ns = self._instants
        spans = self._message.meta.spans
        # What the engine did not spend between our sending and the reply's coming is the wire's.
        inside_ns = sum(elapsed_ns for _, elapsed_ns in spans)
        return Spans(
            (
                ("client encode", sent_ns - begin_ns),
                ("wire", max(0, arrived_ns - sent_ns - inside_ns)),
                *spans,
                ("client decode", made_ns - arrived_ns),
            )
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the stop; of a finished run, the deepest that was saved."""
        if not self.checkpoints:
            raise LayerError("the run kept no checkpoint: use stop_at= or save_at=")
        return next(reversed(self.checkpoints.values()))

    @property
    def stopped(self) -> bool:
        return self.state == "stopped"

    @property
    def logits(self) -> Any:
        """The logits asked for, a numpy array in the model's dtype, not to be written into.
        `torch.tensor(run.logits.astype("float32"))` copies them, also those of bfloat16.

        "last": (batch, vocab); "all": (batch, positions, vocab). Raises RequestError where the run
        has none: it is stopped, or only the top few were asked for.
        """
        return self._session.drive(self._show_logits())

    def _show_logits(self) -> Operation[np.ndarray]:
        return read_only((yield from self._fetch_logits()))

    def _fetch_logits(self) -> Operation[np.ndarray]:
        if self._logits is None:
            reply: RunReply = self._message.meta
            if reply.logits is None:
                raise RequestError(self._why_no_logits())
            if reply.logits_id:
                kept = Kept(reply.logits_id, self._session.id, self.id, -1, reply.logits)
                remote = RemoteArray(self._session.connection, self._session.drive, kept, self)
                self._logits = yield from remote._read(())
            else:
                self._logits = np.array(view(reply.logits, self._message.buffers))
        return self._logits

    def _why_no_logits(self) -> str:
        if self.stopped:
            return f"the run is stopped after layer {self.layer}: resume its checkpoint for logits"
        return 'the run was asked for no logits: use logits="last" or "all"'

    def top(self, k: int = 5, *, batch: int = 0) -> Any:
        """The *k* likeliest next tokens of one prompt, likeliest first: a list of `Top`."""
        return self._session.drive(self._top(k, batch))

    def _top(self, k: int, batch: int) -> Operation[list[Top]]:
        reply: RunReply = self._message.meta
        batch = row_of(batch, len(self._ids))
        if reply.top_ids is not None:
            values, ids, log_norm = self._sent_top(batch)
            allowed = f"1 to {len(ids)}, as many as the run was asked for"
            k = checks.whole("k", k, least=1, most=len(ids), allowed=allowed)
            values, ids = values[:k], ids[:k]
        else:
            logits = yield from self._fetch_logits()
            row = logits[batch] if logits.ndim == 2 else logits[batch, -1]
            row = row.astype(np.float64)
            k = checks.whole("k", k, least=1, most=row.size)
            ids = np.argsort(-row, kind="stable")[:k]
            values = row[ids]
            peak = row.max()
            log_norm = peak + np.log(np.exp(row - peak).sum())
        pieces = yield from self._session.pieces_of(ids)
        return [
            Top(piece, int(number), float(np.exp(value - log_norm)), float(value))
            for piece, number, value in zip(pieces, ids, values, strict=True)
        ]

    def _sent_top(self, batch: int) -> tuple[np.ndarray, np.ndarray, float]:
        reply, buffers = self._message.meta, self._message.buffers
        values = view(reply.top_values, buffers)[batch].astype(np.float64)
        ids = view(reply.top_ids, buffers)[batch]
        return values, ids, float(view(reply.top_log_norm, buffers)[batch])

    def lens(self, positions: Any = None, *, k: int = 1) -> Any:
        """The logit lens over all saved layers, see `Checkpoint.lens`."""
        return self.checkpoint.lens(positions, k=k)

    def __repr__(self) -> str:
        kept = ", ".join(map(str, self.checkpoints)) or "none"
        last = next(reversed(self.checkpoints.values()), None)
        inside = self.stopped and last is not None and last.place
        where = f"at {inside}" if inside else f"after layer {self.layer}"
        return f"<run {self.state} {where}, checkpoints: {kept}>"


def along(
    session: Session,
    kepts: Sequence[Kept],
    ids: np.ndarray,
    previous: Checkpoint | None,
    before: np.ndarray,
) -> dict[int | str, Checkpoint]:
    """The checkpoints that a run kept, by layer or by path, each the step before the next."""
    inputs = set(map(_base_of, kepts))  # of layers, for what is inside of them
    found: dict[int | str, Checkpoint] = {}
    bases: dict[int, Checkpoint] = {}
    for kept in kepts:
        point = Checkpoint(session, kept, ids, bases.get(kept.base), previous, before)
        if kept.id in inputs:
            bases[kept.id] = point
        else:
            found[kept.place or kept.layer] = previous = point
    return found


def ask(
    session: Session,
    op: Op,
    meta: msgspec.Struct,
    parcel: Parcel,
    timeout_s: float | None,
    previous: Checkpoint | None = None,
    before: np.ndarray = NO_IDS,
) -> Operation[Run]:
    """Send a RUN, RESUME or CONTINUE and make a Run of the reply. previous, before: as it has them."""
    call = Call(
        op,
        meta,
        session=session.id,
        buffers=parcel.buffers,
        timeout_s=timeout_s,
        progress=session.progress,
    )
    reply = yield call
    try:
        return Run(session, call, reply, parcel.begin_ns, previous, before)
    except BaseException:  # a KeyboardInterrupt: nobody will refer to what it kept
        session.connection.give_back(reply)
        raise


def as_hidden(value: Any, dtype: np.dtype) -> np.ndarray:
    """*value* as an array of *dtype*, the checkpoint's. Raises EditError for one of another, with how to convert it."""
    if isinstance(value, Checkpoint):
        raise EditError(f"hidden: an array, not {value!r}: give its .hidden")
    array = checks.array("hidden", value, kind=EditError)
    if array.dtype != dtype:
        if hasattr(value, "astype"):
            how = "convert it with .astype(checkpoint.dtype)"
        elif type(value).__module__ == "torch":  # which only who gave it has imported
            how = f"convert it with .to(torch.{dtype})"
        else:
            how = "make it with np.array(…, checkpoint.dtype)"
        raise EditError(f"hidden is {array.dtype}, the checkpoint {dtype}: {how}")
    return array
