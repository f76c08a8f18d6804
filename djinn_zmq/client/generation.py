"""A generation: tokens as they come, a stop in any of its steps, and the way on from there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from djinn_zmq.client import checks
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.edits import Edit
from djinn_zmq.client.looks import Top
from djinn_zmq.client.marks import Mark
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.parts import WINDOW, Parts
from djinn_zmq.client.run import Checkpoint, along
from djinn_zmq.client.stops import Logits, wanted_of
from djinn_zmq.errors import LayerError, RequestError
from djinn_zmq.settings import counted
from djinn_zmq.spans import Spans
from djinn_zmq.wire import messages, talks
from djinn_zmq.wire.codec import Message
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import view


class GeneratedToken(NamedTuple):
    """One token of a generation.

    step: 0 for the first. text: what it adds to the text, "" within a character.
    log_probability: natural logarithm, in the model's own distribution, whatever it was drawn from.
    logits: (vocab,) in the model's dtype, where asked for. top: the likeliest, where asked for.
    checkpoints: by layer, those that its forward saved.
    """

    id: int
    text: str
    step: int
    log_probability: float
    logits: np.ndarray | None
    top: list[Top]
    checkpoints: dict[int | str, Checkpoint]

    @property
    def probability(self) -> float:
        return float(np.exp(self.log_probability))


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for: see `Session.generate`."""

    wanted: messages.Wanted
    steps: tuple[int, ...]
    max_new_tokens: int | None
    sampling: talks.Sampling
    ends: tuple[int, ...] | None
    timeout_s: float | None


@dataclass(slots=True, eq=False)
class Said:
    """How far a generation has come, apart from the iterator, which may be gone: where it began
    (session, standing), its request, the tokens before its own, and those taken. passed: the session has gone
    on from elsewhere since the last of these was taken. saved: the last checkpoint that came with these."""

    session: Any
    begin: Any
    request: int | None
    before: np.ndarray | None
    ids: list[int]
    passed: bool = False
    saved: Checkpoint | None = None

    def leave(self) -> None:
        """It is not over, and is to end here: the session stands behind what was taken, if that came last."""
        if self.request is not None:
            self.session.connection.abandon(self.request)
        if self.before is not None and not self.passed:
            said = np.concatenate([self.before, np.array(self.ids, np.int64)])
            pending = said[len(self.begin.ids) - len(self.begin.pending) :]
            saved = self.begin.saved if self.saved is None else self.saved
            self.session.standing = replace(self.begin, pending=pending, saved=saved)


class Generation(Parts[GeneratedToken, talks.Generated]):
    """Tokens as they come: iterate, `async for` in asyncio code. Then:

    tokens: those so far. text: theirs. reason: why it is over: "length", "end" (an end token),
    "stop" (a breakpoint: see `checkpoint`), "" while it is not. step, layer: where it is, or stopped.
    spans: where the time went, on the engine.
    """

    def __init__(self, session: Any, prompt: Any, wish: Wish, begin: Any = None) -> None:
        """session: a `talk.Session`. begin: where it goes on from, if not from where that stands."""
        super().__init__(session, self._asking(prompt))
        self.session = session
        self.tokens: list[GeneratedToken] = []
        self.reason = ""
        self.step = 0
        self.layer = 0
        self.checkpoints: dict[int | str, Checkpoint] = {}
        self.spans = Spans()
        self._wish = wish
        self._begin = begin
        self._parcel: Parcel | None = None
        self._said = Said(session, begin, None, None, [])
        self._previous: Checkpoint | None = None  # the last that was kept on the way here

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> np.ndarray:
        """Those of `tokens`: int64 (tokens,)."""
        return np.array([token.id for token in self.tokens], np.int64)

    @property
    def stopped(self) -> bool:
        return self.reason == "stop"

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the stop; of one that is over, or not yet, the last that was saved."""
        found = [*(token.checkpoints for token in self.tokens), self.checkpoints]
        for checkpoints in reversed(found):
            if checkpoints:
                return next(reversed(checkpoints.values()))
        raise LayerError("the generation kept no checkpoint: use stop_at= or save_at=")

    def finish(self) -> Any:
        """Take all that is left and return this generation, with all that it came to."""
        return self._session.drive(self._finished())

    def _finished(self) -> Operation["Generation"]:
        yield from self._finish()
        return self

    def __repr__(self) -> str:
        said = counted(len(self.tokens), "token")
        if self.stopped:
            return f"<generation stopped after layer {self.layer} of step {self.step}, {said}>"
        return (
            f"<generation of {said}, over: {self.reason}>"
            if self.reason
            else f"<generation of {said} so far>"
        )

    def resume(self, edits: Sequence[Edit] = (), *, hidden: Any = None) -> "Generation":
        """Go on from the stop as it began: the same wishes, the tokens that are left.

        edits, hidden: as in `Checkpoint.resume`; a branch, so that it may be done again.
        """
        if not self.stopped:
            raise RequestError("the generation is not stopped")
        left = self._wish.max_new_tokens
        wish = replace(
            self._wish,
            max_new_tokens=None if left is None else left - len(self.tokens),
            sampling=talks.Sampling(
                self._wish.sampling.temperature,
                self._wish.sampling.top_k,
                self._wish.sampling.top_p,
                None,
            ),
        )
        return self.session.go_on(self.checkpoint, edits, hidden, wish)

    # ---- the operation

    def _asking(self, prompt: Any) -> Operation[Call]:
        session, wish = self.session, self._wish
        session.says(self._said)
        begin = self._said.begin = session.standing if self._begin is None else self._begin
        point, mark = begin.checkpoint, begin.mark
        self._previous = begin.previous
        parcel = self._parcel = Parcel(session.connection, session.id, wish.timeout_s)
        text, ids = yield from session.placed(prompt, begin.pending, parcel)
        hidden, edits = None, ()
        if point is not None:
            hidden, edits = yield from point._carry(begin.edits, begin.hidden, parcel)
            self._said.begin = begin.fixed()
        meta = talks.Generate(
            branch=0 if mark is None else mark.number,
            static=session.static,
            checkpoint=0 if point is None else point.id,
            hidden=hidden,
            edits=edits,
            text=text,
            ids=ids,
            wanted=wish.wanted,
            steps=wish.steps,
            max_new_tokens=wish.max_new_tokens or 0,
            sampling=wish.sampling,
            ends=wish.ends,
        )
        return Call(
            Op.GENERATE,
            meta,
            session=session.id,
            buffers=parcel.buffers,
            timeout_s=wish.timeout_s,
            parts=WINDOW,
        )

    def _on_sent(self, request: int) -> None:
        self._said.request = request

    def _on_arrived(self) -> None:
        """With the first answer, or without one."""
        if self._parcel is not None:
            self._parcel.settle()
            self._parcel = None

    def _take(self, message: Message) -> Operation[GeneratedToken]:
        try:
            token = yield from self._made_of(message)
        except BaseException:  # a KeyboardInterrupt: nobody will refer to what its forward saved
            self.session.connection.give_back(message)
            raise
        self._said.ids.append(token.id)
        if token.checkpoints:
            self._said.saved = self._previous
        self._said.passed = False
        self.tokens.append(token)
        self.step = token.step + 1
        return token

    def _made_of(self, message: Message) -> Operation[GeneratedToken]:
        self._on_arrived()
        part: talks.Token = message.meta
        said = self._said
        if part.before is not None:
            said.before = np.array(view(part.before, message.buffers))[0]
        assert said.before is not None
        checkpoints = self._saved(part.checkpoints)
        top = []
        if part.top_ids is not None and part.top_values is not None:
            top = yield from self._tops(part, message)
        return GeneratedToken(
            id=part.id,
            text=part.text,
            step=part.step,
            log_probability=part.log_probability,
            logits=None if part.logits is None else np.array(view(part.logits, message.buffers))[0],
            top=top,
            checkpoints=checkpoints,
        )

    def _saved(self, kepts: Sequence[messages.Kept]) -> dict[int | str, Checkpoint]:
        """The checkpoints of a forward of this generation."""
        if not kepts:
            return {}
        ids = self._ids_of(kepts[0])
        begin = len(ids) - kepts[0].tensor.shape[1]  # of the forward's own
        own = ids[begin:].reshape(1, -1)
        found = along(self.session, kepts, own, self._previous, ids[:begin])
        self._previous = list(found.values())[-1]
        return found

    def _ids_of(self, kept: messages.Kept) -> np.ndarray:
        """All tokens up to a checkpoint's forward, that included: `Kept.past` says how many."""
        said = self._said
        before = self._begin_ids if said.before is None else said.before
        return np.concatenate([before, np.array(said.ids, np.int64)])[: kept.past]

    @property
    def _begin_ids(self) -> np.ndarray:
        return self._said.begin.ids

    def _tops(self, part: talks.Token, message: Message) -> Operation[list[Top]]:
        values = view(part.top_values, message.buffers)[0].astype(np.float64)  # type: ignore[arg-type]
        ids = view(part.top_ids, message.buffers)[0]  # type: ignore[arg-type]
        pieces = yield from self.session.pieces_of(ids)
        norm = part.log_norm
        return [
            Top(piece, int(number), float(np.exp(value - norm)), float(value))
            for piece, number, value in zip(pieces, ids, values, strict=True)
        ]

    def _end(self, message: Message) -> Operation[talks.Generated]:
        self._on_arrived()
        reply: talks.Generated = message.meta
        self.reason, self.step, self.layer = reply.reason, reply.step, reply.layer
        self.spans = Spans(reply.spans)
        session, stand = self.session, type(self._said.begin)
        try:
            ids = np.array(view(reply.ids, message.buffers))[0]
            if self._said.before is None:
                self._said.before = ids
            checkpoints = self._saved(reply.checkpoints)
            mark = None
            if reply.branch:
                # Its last token was drawn, and nothing has been run since.
                mark = Mark(
                    session.connection, session.id, reply.branch, ids, self._previous, unrun=1
                )
        except BaseException:  # as in `_take`
            session.connection.give_back(message)
            raise
        self.checkpoints = checkpoints
        session.has_said(self._said, stand(mark, None if mark is not None else self.checkpoint))
        return reply
        yield


def wish_of(
    model: messages.ModelInfo,
    max_new_tokens: int | None,
    stop_at: Any = None,
    save_at: Any = (),
    steps: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    ends: int | Sequence[int] | None = None,
    logits: Logits = "none",
    timeout_s: float | None = None,
) -> Wish:
    """The caller's words as data. Raises RequestError for what is none."""
    if isinstance(logits, str) and logits == "all":
        raise RequestError('logits="all": a token has its own, "last"; or "none", or how many')
    wanted = wanted_of(stop_at, save_at, logits, 0, model.num_layers)
    sampling = talks.Sampling(
        checks.number("temperature", temperature),
        checks.whole("top_k", top_k, least=0),
        checks.number("top_p", top_p),
        None if seed is None else checks.whole("seed", seed, least=0),
    )
    return Wish(
        wanted,
        () if steps is None else _steps(steps),
        None if max_new_tokens is None else checks.whole("max_new_tokens", max_new_tokens, least=1),
        sampling,
        None if ends is None else _wholes("ends", ends),
        timeout_s,
    )


def _steps(values: Any) -> tuple[int, ...]:
    steps = _wholes("steps", values)
    if not steps:  # which would be every step
        raise RequestError("steps=[]: at least one, or None for every step")
    return steps


def _wholes(what: str, values: Any) -> tuple[int, ...]:
    several = checks.several(what, values, "a whole number, or several", alone=checks.WHOLE)
    return tuple(checks.whole(what, value, least=0) for value in several)
