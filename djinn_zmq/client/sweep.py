"""Sweeps of a checkpoint: many branches as batches, streamed as they are done.

for done in point.sweep([[Zero(at=(0, -1, head))] for head in range(4)], logits=5):
    print(done.number, done.top(1))
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.edits import Edit, each_of, placed_edits
from djinn_zmq.client.looks import Top, row_of
from djinn_zmq.client.parts import OVER, WINDOW, Bundles
from djinn_zmq.client.session import Session
from djinn_zmq.errors import EditError, RequestError
from djinn_zmq.settings import KIB, counted
from djinn_zmq.wire import messages
from djinn_zmq.wire import sweeps as wire
from djinn_zmq.wire.codec import BUFFERS_LIMIT, Message
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import INLINE_LIMIT, view

Logits = str | int
META_NBYTES = 128 * KIB  # of one request's edits; more are asked for one request after another
EDIT_NBYTES = 128  # about what one takes without its values


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sweep ran, and what one full forward a branch would have run.

    layers: executed, counted once for each prompt that went through one. unchanged: branches whose
    edit changed no bit, answered with the outcome of the run without it.
    """

    branches: int = 0
    unchanged: int = 0
    batches: int = 0
    layers: int = 0
    layers_full: int = 0

    @property
    def skipped(self) -> float:
        """The share of the layers that was not run."""
        return 1 - self.layers / self.layers_full if self.layers_full else 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.branches + other.branches,
            self.unchanged + other.unchanged,
            self.batches + other.batches,
            self.layers + other.layers,
            self.layers_full + other.layers_full,
        )

    def __str__(self) -> str:
        same = f", {self.unchanged} of them unchanged" if self.unchanged else ""
        return (
            f"{counted(self.branches, 'branch')}{same}, in {counted(self.batches, 'batch')}: {self.layers} of "
            f"{counted(self.layers_full, 'layer')} executed, {self.skipped:.0%} skipped"
        )


class Outcome:
    """What one branch came to: its last position's logits, as far as they were asked for.

    number: the branch's place in the sweep. log_norm: float64 (batch,), log of the sum of exp over
    all logits. token_logits: (batch, tokens), of those asked for; None where none were.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        log_norm: np.ndarray,
        logits: np.ndarray | None,
        top: tuple[np.ndarray, np.ndarray] | None,
        token_logits: np.ndarray | None,
    ) -> None:
        """top: values and ids, (batch, k)."""
        self._session = session
        self.number = number
        self.log_norm = log_norm
        self.token_logits = token_logits
        self._logits = logits
        self._top = top

    @property
    def logits(self) -> np.ndarray:
        """(batch, vocab), in the model's dtype. Raises RequestError where they were not asked for."""
        if self._logits is None:
            raise RequestError('the sweep was not asked for all logits: use logits="last"')
        return self._logits

    @property
    def token_probabilities(self) -> np.ndarray:
        """float64 (batch, tokens), of those asked for."""
        if self.token_logits is None:
            raise RequestError("the sweep was asked for no tokens: use tokens=")
        return np.exp(self.token_logits.astype(np.float64) - self.log_norm[:, None])

    def top(self, k: int = 5, *, batch: int = 0) -> Any:
        """The *k* likeliest next tokens of one prompt, likeliest first: a list of `Top`."""
        return self._session.drive(self._likeliest(k, batch))

    def _likeliest(self, k: int, batch: int) -> Operation[list[Top]]:
        batch = row_of(batch, len(self.log_norm))
        if self._top is not None:
            values, ids = (part[batch] for part in self._top)
        else:
            row = self.logits[batch].astype(np.float64)
            ids = np.argsort(-row, kind="stable")
            values = row[ids]
        allowed = f"1 to {len(ids)}, as many as the sweep was asked for"
        k = checks.whole("k", k, least=1, most=len(ids), allowed=allowed)
        pieces = yield from self._session.pieces_of(ids[:k])
        log_norm = float(self.log_norm[batch])
        return [
            Top(piece, int(number), float(np.exp(float(value) - log_norm)), float(value))
            for piece, number, value in zip(pieces, ids[:k], values[:k], strict=True)
        ]

    def __repr__(self) -> str:
        return f"<outcome of branch {self.number}>"


class Sweep(Bundles[Outcome, Cost]):
    """The branches of a sweep, an `Outcome` each, in their order.

    total: how many. done: how many the engine has worked on so far. result: its `Cost`, when it is
    over.
    """

    def __init__(
        self,
        session: Session,
        checkpoint: Any,
        branches: Iterable[Sequence[Edit] | Edit],
        logits: Logits,
        tokens: Any,
        memory: int,
        timeout_s: float | None,
    ) -> None:
        super().__init__(session)
        self._checkpoint = checkpoint
        self._results = results_of(logits, ())
        self._tokens = tokens
        self._memory = memory
        self._timeout_s = timeout_s
        self._left = deque(_requests(branches))
        self._asked: Sequence[Sequence[Edit] | Edit] = ()
        self._finished = 0
        self._cost = Cost()
        self.total = sum(map(len, self._left))
        self.done = 0

    def all(self) -> Any:
        """Every outcome that is left, in a list."""
        return self._session.drive(self._all())

    def _all(self) -> Operation[list[Outcome]]:
        found: list[Outcome] = []
        while (outcome := (yield from self._step())) is not OVER:
            found.append(outcome)
        return found

    def _more(self) -> Operation[Call] | None:
        if self._left:
            return self._ask(self._left.popleft())
        self.result = self._cost
        return None

    def _ask(self, branches: Sequence[Sequence[Edit] | Edit]) -> Operation[Call]:
        if self._tokens is not None:
            tokens = yield from token_ids(self._session, self._tokens)
            self._results = wire.Results(self._results.logits, self._results.top, tokens)
            self._tokens = None
        parcel = self._pack(self._timeout_s)
        self._asked = branches  # held: an array of `Checkpoint.writable` is read where it stands
        on_wire = []
        dtype = self._checkpoint._kept.tensor.dtype
        for number, edits in enumerate(branches, self._finished):
            try:
                on_wire.append((yield from placed_edits(edits, parcel, dtype)))
            except EditError as exc:
                raise EditError(f"branch {number}: {exc}") from exc
        meta = wire.Sweep(self._checkpoint.id, tuple(on_wire), self._results, self._memory)
        return Call(
            Op.SWEEP,
            meta,
            session=self._session.id,
            buffers=parcel.buffers,
            timeout_s=self._timeout_s,
            progress=self._session.progress,
            parts=WINDOW,
        )

    def _items(self, message: Message) -> list[Outcome]:
        part: wire.Swept = message.meta
        self.done = self._finished + part.done
        numbers = [self._finished + number for number in part.branches]
        return outcomes_of(self._session, numbers, part.outcomes, message)

    def _end(self, message: Message) -> Operation[None]:
        cost = cost_of(message.meta.cost)
        self._cost += cost
        self._finished += cost.branches
        return
        yield

    def __repr__(self) -> str:
        return f"<sweep of {counted(self.total, 'branch')}, {self.done} done>"


def _requests(
    branches: Iterable[Sequence[Edit] | Edit],
) -> list[Sequence[Sequence[Edit] | Edit]]:
    """*branches* in as many requests as their values need. Raises RequestError for none."""
    branches = checks.several("branches", branches, "a list of branches, each its edits")
    found: list[list[Sequence[Edit] | Edit]] = [[]]
    nbytes = buffers = 0
    for edits in map(list, map(each_of, branches)):  # once: a generator's are gone then
        sizes = [
            array.nbytes
            for edit in edits
            if isinstance(array := getattr(edit, "array", None), np.ndarray)
        ]
        more = sum(size for size in sizes if size <= INLINE_LIMIT) + EDIT_NBYTES * (len(sizes) + 1)
        apart = sum(size > INLINE_LIMIT for size in sizes)
        if found[-1] and (nbytes + more > META_NBYTES or buffers + apart > BUFFERS_LIMIT):
            found.append([])
            nbytes = buffers = 0
        found[-1].append(edits)
        nbytes, buffers = nbytes + more, buffers + apart
    if not found[0]:
        raise RequestError("a sweep of no branches")
    return list(found)


def outcomes_of(
    session: Session, numbers: Sequence[int], outcomes: wire.Outcomes, message: Message
) -> list[Outcome]:
    def seen(tensor: Any) -> np.ndarray | None:
        return None if tensor is None else np.array(view(tensor, message.buffers))

    log_norm, logits, tokens = map(seen, (outcomes.log_norm, outcomes.logits, outcomes.tokens))
    values, ids = seen(outcomes.top_values), seen(outcomes.top_ids)
    assert log_norm is not None
    return [
        Outcome(
            session,
            number,
            log_norm[place],
            None if logits is None else logits[place],
            None if values is None or ids is None else (values[place], ids[place]),
            None if tokens is None else tokens[place],
        )
        for place, number in enumerate(numbers)
    ]


def cost_of(cost: wire.Cost) -> Cost:
    return Cost(cost.branches, cost.unchanged, cost.batches, cost.layers, cost.layers_full)


def results_of(logits: Logits, tokens: tuple[int, ...]) -> wire.Results:
    """Raises RequestError for what is none."""
    if isinstance(logits, str) and logits in ("last", "none"):
        return wire.Results(str(logits), 0, tokens)
    allowed = '"last", "none", or how many of the likeliest, 1 or more'
    return wire.Results("top", checks.whole("logits", logits, least=1, allowed=allowed), tokens)


def token_ids(session: Session, tokens: Any) -> Operation[tuple[int, ...]]:
    """Ids as they are, each text as the one token it must be. Raises RequestError."""
    found: list[int] = []
    alone = (*checks.WHOLE, str)
    for one in checks.several("tokens", tokens, "text, an id, or several", alone=alone):
        if isinstance(one, str):
            reply = yield Call(Op.TOKENS, messages.Tokens(str(one), None), session=session.id)
            ids = view(reply.meta.ids, reply.buffers)
            if len(ids) != 1:
                raise RequestError(f"{one!r} is {len(ids)} tokens: one is needed, or its id")
            found.append(int(ids[0]))
        else:
            found.append(checks.whole("tokens", one, allowed="text, or an id"))
    return tuple(found)


def memory_of(memory: Any) -> int:
    """Bytes; 0 where the engine is to choose."""
    if memory is None:
        return 0
    return checks.whole("memory", memory, least=1, allowed="a positive number of bytes")
