"""Looks at a checkpoint: the server says in few numbers what it holds; the tensor stays there."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.arrays import brought, left_behind
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.session import Session
from djinn_zmq.errors import LayerError, RequestError, SelectionError
from djinn_zmq.wire import looks as wire
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import view

CELL = 18  # characters of a lens' column at most


class Top(NamedTuple):
    """One candidate for the next token."""

    token: str  # its text; "" where the model has no tokenizer
    id: int
    probability: float
    logit: float

    def __repr__(self) -> str:
        return f"Top(token={self.token!r}, id={self.id}, probability={self.probability:.4g}, logit={self.logit:.6g})"


class Diff(NamedTuple):
    """How one checkpoint differs from another.

    norms: float32 (batch, positions), of the difference. cosine: float32 (batch, positions), NaN
    where one of both is zero. largest: the largest absolute difference, at the index *at*.
    same_bits: whether there is none, the sign of zero included.
    """

    norms: np.ndarray
    cosine: np.ndarray
    largest: float
    at: tuple[int, ...]
    same_bits: bool

    def __str__(self) -> str:
        if self.same_bits:
            return "equal bit for bit"
        return (
            f"norms {_range(self.norms)}, cosine {_range(self.cosine)}, "
            f"largest difference {self.largest:.4g} at {list(self.at)}"
        )


class Lens:
    """The likeliest next tokens if the model ended after each saved layer: print it.

    layers: those looked at (L,). positions: those looked at (P,), counted from the start.
    ids: int64 (L, batch, P, k), likeliest first. probabilities: float64 of that shape.
    tokens: the ids' texts, an object array of that shape.
    """

    def __init__(
        self,
        layers: np.ndarray,
        positions: Sequence[int],
        ids: np.ndarray,
        probabilities: np.ndarray,
        tokens: np.ndarray,
        prompt: np.ndarray,
    ) -> None:
        """prompt: object array (batch, P), the texts at the positions."""
        self.layers = tuple(int(layer) for layer in layers)
        self.positions = tuple(positions)
        self.ids = ids
        self.probabilities = probabilities
        self.tokens = tokens
        self._prompt = prompt

    def __getitem__(self, place: tuple[int, int]) -> list[tuple[str, float]]:
        """lens[layer, position]: (token, probability) of the first prompt, likeliest first.

        Raises LayerError, SelectionError for what was not looked at.
        """
        if not isinstance(place, tuple) or len(place) != 2:
            raise SelectionError(f"lens[{checks.shown(place)}]: a layer and a position")
        layer, position = place
        if not checks.is_whole(layer) or layer not in self.layers:
            given = checks.shown(layer)
            raise LayerError(f"the lens has no layer {given}: it has {list(self.layers)}")
        if not checks.is_whole(position) or position not in self.positions:
            given = checks.shown(position)
            raise SelectionError(f"the lens has no position {given}: it has {list(self.positions)}")
        at = self.layers.index(layer), 0, self.positions.index(position)
        return list(zip(self.tokens[at].tolist(), self.probabilities[at].tolist(), strict=True))

    def __str__(self) -> str:
        """A table for each prompt: layer by position, in each cell the likeliest token."""
        return "\n\n".join(self._table(batch) for batch in range(self.ids.shape[1]))

    def _table(self, batch: int) -> str:
        rows = [["layer", *self._heads(batch)]]
        for row, layer in enumerate(self.layers):
            cells = [
                f"{_printable(self.tokens[row, batch, column, 0], self.ids[row, batch, column, 0])}"
                f" {self.probabilities[row, batch, column, 0]:.2f}"
                for column in range(len(self.positions))
            ]
            rows.append([str(layer), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place == 0 else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def _heads(self, batch: int) -> list[str]:
        return [
            f"{position}: {_printable(text, '')}".rstrip(": ")
            for position, text in zip(self.positions, self._prompt[batch], strict=True)
        ]

    def __repr__(self) -> str:
        return f"<lens over layers {list(self.layers)} at positions {list(self.positions)}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In a notebook it is shown as it is printed."""
        printer.text(str(self))


class Looked(Protocol):
    """What a checkpoint offers to a look."""

    id: int


class Looks:
    """The looks that a `Checkpoint` has."""

    id: int
    layer: int
    _session: Session
    _kept: Kept
    _ids: np.ndarray  # of its run: int64 (batch, positions)

    def norms(self) -> Any:
        """The L2 norm of each position's hidden state: float32 (batch, positions)."""
        return self._session.drive(self._norms())

    def _norms(self) -> Operation[np.ndarray]:
        (norms,) = yield from self._look(wire.Norms(self.id))
        return norms

    def top(self, k: int = 5, *, batch: int = 0) -> Any:
        """The *k* likeliest next tokens if the model's own tail came now: a list of `Top`."""
        return self._session.drive(self._top(k, batch))

    def _top(self, k: int, batch: int) -> Operation[list[Top]]:
        batch = row_of(batch, len(self._ids))
        values, ids, log_norm = yield from self._look(wire.Top(self.id, checks.whole("k", k)))
        pieces = yield from self._session.pieces_of(ids[batch])
        return [
            Top(piece, int(number), float(np.exp(value - log_norm[batch])), float(value))
            for piece, number, value in zip(
                pieces, ids[batch], values[batch].astype(np.float64), strict=True
            )
        ]

    def lens(self, positions: Any = None, *, k: int = 1) -> Any:
        """The logit lens over all layers its run saved: a `Lens`.

        The model's own norm and head on each layer's hidden state. positions: an int, several, or
        all of them. k: how many tokens at each place. After the last layer it is the model's own
        answer.
        """
        return self._session.drive(self._lens(positions, k))

    def _lens(self, positions: Any, k: int) -> Operation[Lens]:
        extent = self._ids.shape[1]
        chosen = _positions(positions, extent)
        asked = wire.Lens(self.id, tuple(chosen), checks.whole("k", k))
        layers, values, ids, log_norm = yield from self._look(asked)
        texts = yield from self._texts(ids)
        prompt = yield from self._texts(self._ids[:, chosen])
        shares = np.exp(values.astype(np.float64) - log_norm[..., None])
        return Lens(layers, chosen, ids, shares, texts, prompt)

    def _texts(self, ids: np.ndarray) -> Operation[np.ndarray]:
        different, places = np.unique(ids, return_inverse=True)
        pieces = yield from self._session.pieces_of(different)
        return np.array(pieces, object)[places].reshape(ids.shape)

    def diff(self, other: Looked) -> Any:
        """How it differs from another checkpoint of its shape, also of another model: a `Diff`."""
        if not hasattr(type(other), "hidden"):
            raise RequestError(f"diff with {type(other).__name__}: give a checkpoint")
        return self._session.drive(self._diff(other.id))

    def _diff(self, other: int) -> Operation[Diff]:
        norms, cosine, largest, place, same = yield from self._look(wire.Diff(self.id, other))
        at = tuple(int(axis) for axis in place)
        return Diff(norms, cosine, float(largest), at, bool(same))

    def attention(self, layer: int | None = None) -> Any:
        """Attention weights: (batch, heads, positions, keys), rows are queries.

        keys: the positions, and in a session before them those of the past that the layer holds.

        layer: as stops count, the one after which a stop at this number comes; by default the next
        that would run. Computed by running that layer once more with eager attention; raises
        RequestError where the architecture gives no weights, LayerError for a layer that is not
        there or lies behind.
        """
        chosen = self.layer + 1 if layer is None else checks.whole("layer", layer, kind=LayerError)
        return self._session.drive(self._attention(chosen))

    def _attention(self, layer: int) -> Operation[np.ndarray]:
        (weights,) = yield from self._look(wire.Attention(self.id, layer))
        return weights

    def _look(self, asked: wire.View) -> Operation[list[np.ndarray]]:
        """Ask, and fetch what the answer left in slots."""
        session = self._session
        reply = yield Call(
            Op.LOOK, wire.Look(asked), session=self._kept.session, progress=session.progress
        )
        connection, number = session.connection, self._kept.session
        try:
            found = [
                left_behind(connection, session.drive, number, seen.id, seen.tensor)
                if seen.id
                else np.array(view(seen.tensor, reply.buffers))
                for seen in reply.meta.seen
            ]
        except BaseException:  # a KeyboardInterrupt: nobody will refer to what was left
            connection.give_back(reply)
            raise
        return (yield from brought(found))


def _positions(positions: Any, extent: int) -> list[int]:
    """Counted from the start. Raises SelectionError for one that the prompt does not have."""
    if positions is None:
        return list(range(extent))
    allowed = "a position, or several"
    many = checks.several("positions", positions, allowed, alone=checks.WHOLE, kind=SelectionError)
    chosen = [checks.whole("positions", one, kind=SelectionError) for one in many]
    for one in chosen:
        if not -extent <= one < extent:
            raise SelectionError(
                f"position {one} of a prompt of {extent}: allowed {-extent} to {extent - 1}"
            )
    if not chosen:
        raise SelectionError("no position to look at")
    return [one % extent for one in chosen]


def row_of(batch: Any, count: int) -> int:
    """Which prompt of *count* is meant. Raises RequestError for none."""
    allowed = f"0 to {count - 1}, of a batch of {count}"
    return checks.whole("batch", batch, least=0, most=count - 1, allowed=allowed)


def _printable(text: str, number: Any) -> str:
    """A token's text in a table's cell; its id where it has none."""
    shown = text.strip().replace("\n", "\\n").replace("\t", "\\t") or (repr(text) if text else "")
    shown = shown or str(number)
    return shown if len(shown) <= CELL else shown[: CELL - 1] + "…"


def _range(values: np.ndarray) -> str:
    return f"{np.min(values):.4g} to {np.max(values):.4g}"
