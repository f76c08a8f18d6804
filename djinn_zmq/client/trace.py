"""Causal tracing: where in a clean run does what a corrupted one lacks come from?

Meng et al., "Locating and Editing Factual Associations in GPT", 2022, section 2: each cell of the
grid is the corrupted prompt's run with one layer's hidden state, at some positions, from the clean.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.parts import WINDOW, Bundles
from djinn_zmq.client.prompts import Prompt, ids_of, texts_of
from djinn_zmq.client.session import Session
from djinn_zmq.client.sweep import Cost, Outcome, cost_of, outcomes_of, results_of, token_ids
from djinn_zmq.errors import LayerError, PromptError, RequestError
from djinn_zmq.settings import counted
from djinn_zmq.wire import sweeps as wire
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Tensor, view


class Cell(NamedTuple):
    """One patch of the grid, as it comes. outcome: of the corrupted run with it."""

    number: int
    outcome: Outcome
    done: int
    total: int


class Grid:
    """A whole trace: print it.

    layers: (L,). positions: (P,), each one or several. tokens: ids, by default the likeliest of the
    clean run and of the corrupted one; texts: theirs. logits: (L, P, tokens); probabilities: float64
    of that shape. clean, corrupted: float64 (tokens,), the probabilities in the runs as they are.
    cost: what was run. outcomes: (L·P,), with the logits asked for.
    """

    def __init__(
        self,
        reply: wire.TraceReply,
        outcomes: Sequence[Outcome],
        base: Sequence[Outcome],
        texts: Sequence[str],
        prompt: Sequence[str],
    ) -> None:
        """base: of the clean and of the corrupted run. prompt: the corrupted one's tokens."""
        self.layers = reply.layers
        self.positions = reply.positions
        self.tokens = reply.tokens
        self.texts = tuple(texts)
        self.cost: Cost = cost_of(reply.cost)
        self.outcomes = tuple(outcomes)
        shape = (len(self.layers), len(self.positions), len(self.tokens))
        self.logits = np.stack([_logits(one) for one in outcomes]).reshape(shape)
        self.probabilities = np.stack([one.token_probabilities[0] for one in outcomes])
        self.probabilities = self.probabilities.reshape(shape)
        self.clean, self.corrupted = (one.token_probabilities[0] for one in base)
        self._base_logits = [_logits(one).astype(np.float64) for one in base]
        self._prompt = tuple(prompt)

    @property
    def recovered(self) -> np.ndarray:
        """float64 (L, P): how much of the logit difference between the first two tokens a patch
        brings back; 0: as corrupted, 1: as clean. Raises RequestError where there are not two."""
        if len(self.tokens) < 2 or self.tokens[0] == self.tokens[1]:
            raise RequestError("the recovered share needs two different tokens: use tokens=")
        apart = self.logits[..., 0].astype(np.float64) - self.logits[..., 1]
        clean, corrupted = (one[0] - one[1] for one in self._base_logits)
        found: np.ndarray = (apart - corrupted) / (clean - corrupted)
        return found

    def __str__(self) -> str:
        """Layer by position: the first token's probability."""
        head = ["layer", *(self._name(group) for group in self.positions)]
        rows = [
            [str(layer), *(f"{cell:.3f}" for cell in row)]
            for layer, row in zip(self.layers, self.probabilities[..., 0], strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
        token = self.texts[0] or str(self.tokens[0])
        title = f'P("{token}"): clean {self.clean[0]:.3f}, corrupted {self.corrupted[0]:.3f}'
        return "\n".join([title, *lines])

    def _name(self, group: tuple[int, ...]) -> str:
        # Each by itself: pieces of a tokenizer of whole words come without the blanks between these.
        text = " ".join(self._prompt[position].strip() for position in group).strip()
        return f"{','.join(map(str, group))}: {text}" if text else ",".join(map(str, group))

    def __repr__(self) -> str:
        return (
            f"<grid of {counted(len(self.layers), 'layer')} × "
            f"{counted(len(self.positions), 'position')}>"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In a notebook it is shown as it is printed."""
        printer.text(str(self))


class Trace(Bundles[Cell, Grid]):
    """The cells of a trace as they are done, not in order. `finish()` gives the whole `Grid`."""

    def __init__(
        self,
        session: Session,
        prompts: tuple[Prompt, Prompt],
        layers: Any,
        positions: Any,
        tokens: Any,
        logits: Any,
        memory: int,
        timeout_s: float | None,
    ) -> None:
        super().__init__(session)
        self._prompts = prompts
        self._layers = _layers(layers)
        self._positions = _groups(positions)
        self._tokens = tokens
        self._logits = logits
        self._memory = memory
        self._timeout_s = timeout_s
        self._asked = False
        self._cells: dict[int, Outcome] = {}

    def __repr__(self) -> str:
        return f"<trace, {counted(len(self._cells), 'cell')} done>"

    def _more(self) -> Operation[Call] | None:
        if self._asked:
            return None
        self._asked = True
        return self._ask()

    def _ask(self) -> Operation[Call]:
        clean, corrupted = self._prompts
        tokens: tuple[int, ...] = ()
        if self._tokens is not None:
            tokens = yield from token_ids(self._session, self._tokens)
            if not tokens:
                raise RequestError("tokens=[]: at least one, or None for the likeliest")
        parcel = self._pack(self._timeout_s)
        meta = wire.Trace(
            (yield from _placed(clean, parcel)),
            (yield from _placed(corrupted, parcel)),
            self._layers,
            self._positions,
            results_of(self._logits, tokens),
            self._memory,
        )
        return Call(
            Op.TRACE,
            meta,
            session=self._session.id,
            buffers=parcel.buffers,
            timeout_s=self._timeout_s,
            progress=self._session.progress,
            parts=WINDOW,
        )

    def _items(self, message: Message) -> list[Cell]:
        part: wire.Traced = message.meta
        outcomes = outcomes_of(self._session, part.branches, part.outcomes, message)
        self._cells.update(zip(part.branches, outcomes, strict=True))
        return [Cell(one.number, one, part.done, part.total) for one in outcomes]

    def _end(self, message: Message) -> Operation[None]:
        reply: wire.TraceReply = message.meta
        base = outcomes_of(self._session, range(2), reply.base, message)
        ids = np.array(view(reply.ids, message.buffers))
        texts = yield from self._session.pieces_of(np.array(reply.tokens))
        prompt = yield from self._session.pieces_of(ids[1])
        outcomes = [self._cells[number] for number in sorted(self._cells)]
        self.result = Grid(reply, outcomes, base, texts, prompt)


def _placed(prompt: Prompt, parcel: Parcel) -> Operation[str | Tensor]:
    texts = texts_of(prompt)
    if len(texts) > 1:
        raise PromptError(f"{len(texts)} prompts: a trace takes one clean and one corrupted")
    if texts:
        return texts[0]
    return (yield from parcel.place(ids_of(prompt)))


def _logits(outcome: Outcome) -> np.ndarray:
    """(tokens,)"""
    assert outcome.token_logits is not None
    row: np.ndarray = outcome.token_logits[0]
    return row


def _layers(layers: Any) -> tuple[int, ...]:
    if layers is None:
        return ()
    allowed = "a layer is a whole number"
    many = checks.several("layers", layers, allowed, alone=checks.WHOLE, kind=LayerError)
    if not many:
        raise LayerError("layers=[]: at least one, or None for all of them")
    return tuple(checks.whole("layers", one, allowed=allowed, kind=LayerError) for one in many)


def _groups(positions: Any) -> tuple[tuple[int, ...], ...]:
    """Each position by itself, or several patched together."""
    if positions is None:
        return ()
    allowed = "a whole number, or several that go together"

    def many(value: Any) -> list[Any]:
        return checks.several("positions", value, allowed, alone=checks.WHOLE)

    found = []
    for group in map(many, many(positions)):
        if not group:
            raise RequestError(f"positions=[[]]: {allowed}")
        found.append(tuple(checks.whole("positions", one, allowed=allowed) for one in group))
    if not found:
        raise RequestError("positions=[]: at least one, or None for all of them")
    return tuple(found)
