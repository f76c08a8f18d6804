"""A conversation with a model: tokens so far, their keys and values on the server, and where it stands.

    with model.session() as session:
        session.run("the capital of")
        for token in session.generate(" france is", max_new_tokens=8):
            print(token.text, end="")

A session stands at a mark (between two forwards), or at a checkpoint (within one). Whatever is asked
goes on from there and moves it; `mark`, `back` and every checkpoint lead to other branches.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from djinn_zmq.client import checks, tiers
from djinn_zmq.client.blocks import AsyncBlock, Block
from djinn_zmq.client.calls import CLOSE_S, Call, Operation, Progress
from djinn_zmq.client.connection import Connection
from djinn_zmq.client.edits import Edit, each_of, own
from djinn_zmq.client.generation import Generation, Said, Wish, wish_of
from djinn_zmq.client.marks import Mark
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.prompts import Prompt, ids_of, texts_of
from djinn_zmq.client.run import NO_IDS, Checkpoint, Run, ask
from djinn_zmq.client.session import Session as Channel
from djinn_zmq.client.sharing import on_device
from djinn_zmq.client.stops import Logits, wanted_of
from djinn_zmq.errors import Closed, PromptError, RequestError
from djinn_zmq.settings import counted
from djinn_zmq.wire import messages, talks
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.stops import NOTHING
from djinn_zmq.wire.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a session stands: at a mark, at a checkpoint, or (neither) at its beginning.

    edits, hidden: with which the checkpoint is to be gone on from. pending: tokens said behind it
    that have not been run; saved: the last checkpoint that was kept while they were.
    """

    mark: Mark | None = None
    checkpoint: Checkpoint | None = None
    edits: Sequence[Edit] = ()
    hidden: Any = None
    pending: np.ndarray = field(default_factory=lambda: NO_IDS)
    saved: Checkpoint | None = None

    @property
    def ids(self) -> np.ndarray:
        if self.checkpoint is not None:
            own = np.concatenate([self.checkpoint._before, self.checkpoint._ids[0]])
        else:
            own = NO_IDS if self.mark is None else self.mark._ids
        return np.concatenate([own, self.pending])

    def fixed(self) -> "Standing":
        """The same with values of its own. A generation that is left is begun again with what it began with, and
        by then the caller may have written other values into his arrays."""
        hidden = self.hidden
        if hidden is not None and not on_device(hidden):
            hidden = np.array(hidden)
        return replace(self, edits=[own(edit) for edit in self.edits], hidden=hidden)

    @property
    def previous(self) -> Checkpoint | None:
        if self.saved is not None:
            return self.saved
        if self.checkpoint is not None:
            return self.checkpoint
        return None if self.mark is None else self.mark.checkpoint


class Session(Block, AsyncBlock, Channel):
    """One conversation. Made by `Model.session`; one thing is asked of it at a time."""

    def __init__(
        self,
        connection: Connection,
        drive: Callable[[Operation[Any]], Any],
        progress: Progress | None,
        opened: messages.Opened,
        static: int,
    ) -> None:
        super().__init__(connection, drive, progress, opened)
        self.static = static
        self.standing = Standing()
        self._said: Said | None = None  # of a generation that is not over
        self._closed = weakref.finalize(self, connection.leftovers.add, self.id, 0)
        self._closed.atexit = False

    # ---- asking

    def run(
        self,
        prompt: Prompt,
        *,
        stop_at: Any = None,
        save_at: Any = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> Run:
        """Go on with *prompt* in one forward pass: text, or token ids (positions,).

        A text goes on right behind what is there: the tokens that begin a whole text come with the
        first only. The rest as in `Model.run`, positions counted from *prompt*'s first.
        Raises PromptError where the conversation gets too long, and what `Model.run` raises.
        """
        wanted = wanted_of(stop_at, save_at, logits, 0, self.model.num_layers)
        return self.drive(self._run(prompt, wanted, timeout_s))

    def _run(
        self, prompt: Prompt, wanted: messages.Wanted, timeout_s: float | None
    ) -> Operation[Run]:
        yield from self.between()
        here = self.standing
        parcel = Parcel(self.connection, self.id, timeout_s)
        try:
            text, ids = yield from self.placed(prompt, here.pending, parcel)
            if not text and ids is None:
                raise PromptError("an empty prompt cannot be run")
            number = 0 if here.mark is None else here.mark.number
            meta = talks.Continue(number, self.static, text, ids, wanted)
            before = NO_IDS if here.mark is None else here.mark.past
            run = yield from ask(self, Op.CONTINUE, meta, parcel, timeout_s, here.previous, before)
        finally:
            parcel.settle()
        self.stand_at(run)
        return run

    def generate(
        self,
        prompt: Prompt = None,
        max_new_tokens: int | None = None,
        *,
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
    ) -> Generation:
        """Go on with *prompt*, if any, and then token by token: iterate over what it gives.

        max_new_tokens: by default as many as the model has room for. It ends earlier behind one of
        *ends*: token ids, by default the model's own end tokens; (): never.
        temperature: 0 takes the likeliest token. Else it draws, from the *top_k* likeliest (0: all)
        that make up *top_p*; with the same *seed* the same tokens, those that transformers'
        `generate` draws. Without one a session goes on drawing where it was.
        stop_at, save_at: as in `run`, in each step or only in *steps* (the first is 0: the forward
        that gives the first token). A generation that stopped has a `checkpoint`; `resume` goes on.
        Where the session stands inside a forward, the rest of that comes first: in the step that it
        stopped in, or, with a prompt behind it, without a stop.
        logits: "last" gives each token its logits (vocab,), a number its likeliest rivals.
        Left early, by `break` say, the session stands behind the last token taken; where it was
        drawing is lost then: give the next a seed.
        Raises RequestError for what is no such wish; and, when iterated, PromptError where it gets too
        long, LayerError, StopError for a stop that is not there or a step that never comes, EditError,
        DeadlineExceeded, Lost, and Cancelled once something else was asked of the session.
        """
        wish = wish_of(
            self.model, max_new_tokens, stop_at, save_at, steps, temperature, top_k, top_p, seed,
            ends, logits, timeout_s,
        )  # fmt: skip
        return Generation(self, prompt, wish)

    def generate_from(
        self,
        checkpoint: Checkpoint,
        max_new_tokens: int | None,
        edits: Sequence[Edit],
        hidden: Any,
        **more: Any,
    ) -> Generation:
        """What `Checkpoint.generate` does."""
        wish = wish_of(self.model, max_new_tokens, **more)
        return self.go_on(checkpoint, edits, hidden, wish)

    def go_on(
        self, checkpoint: Checkpoint, edits: Sequence[Edit], hidden: Any, wish: Wish
    ) -> Generation:
        return Generation(
            self, None, wish, Standing(None, checkpoint, list(each_of(edits)), hidden)
        )

    def placed(
        self, prompt: Prompt, pending: np.ndarray, parcel: Parcel
    ) -> Operation[tuple[str, Tensor | None]]:
        """What is asked with, as text behind ids; either may be missing."""
        texts = () if prompt is None else texts_of(prompt)
        if len(texts) > 1:
            raise PromptError(f"{len(texts)} prompts: a session is one conversation")
        ids = pending
        if prompt is not None and not texts:
            rows = ids_of(prompt)
            if len(rows) > 1:
                raise PromptError(f"{len(rows)} prompts: a session is one conversation")
            ids = np.concatenate([pending, rows[0]])
        placed = None
        if ids.size:
            placed = yield from parcel.place(ids.reshape(1, -1))
        return (texts[0] if texts else ""), placed

    # ---- where it stands

    @property
    def ids(self) -> np.ndarray:
        """All tokens up to where it stands: int64 (positions,)."""
        self.leave()
        return self.standing.ids

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that it stands at, or the last one before."""
        self.leave()
        return self.standing.previous

    def mark(self) -> Any:
        """Where it stands, to come `back` to. At a checkpoint: the end of its forward."""
        return self.drive(self._mark())

    def _mark(self) -> Operation[Mark]:
        yield from self.between()
        if self.standing.pending.size:
            yield from self._run(None, NOTHING, None)
        if self.standing.mark is None:
            raise RequestError("the conversation has not begun: there is nothing to mark")
        return self.standing.mark

    def back(
        self, to: Mark | Checkpoint | None = None, *, by: str = "checkpoint"
    ) -> Checkpoint | None:
        """Step back to the checkpoint before where it stands, and go on from there next time.

        by: "checkpoint": the last one, a layer or a token ago; "token": the last one of an earlier
        forward. to: this checkpoint, or this mark, forwards or backwards.
        Returns the checkpoint it stands at. Raises RequestError where there is none left.
        """
        checks.one_of("by", by, ("checkpoint", "token"))
        self._check_open()
        self.leave()
        if isinstance(to, Mark):
            if to.session != self.id:
                raise RequestError("a mark of another session")
            self.standing = Standing(to)
            return to.checkpoint
        if to is None:
            to = self._before(by)
        elif not isinstance(to, Checkpoint) or to._session is not self:
            raise RequestError(f"{checks.shown(to)} is no checkpoint or mark of this session")
        self.standing = Standing(None, to)
        return to

    def rebuild(self) -> None:
        """Have all its tokens run again, with the next thing asked: after the death of an engine,
        which took their keys and values along. In one forward, so with other roundings."""
        self._check_open()
        self.leave()
        self.standing = Standing(pending=self.standing.ids)

    def _before(self, by: str) -> Checkpoint:
        here = self.standing
        point = here.previous
        if here.checkpoint is not None and not here.pending.size:
            point = here.checkpoint._previous
        at = len(here.ids)
        while point is not None and (not point.kept or (by == "token" and point.position >= at)):
            point = point._previous
        if point is None:
            raise RequestError("there is no checkpoint before here: use stop_at= or save_at=")
        return point

    def stand_at(self, run: Run) -> None:
        if run.mark is not None:
            self.standing = Standing(run.mark)
        elif run.stopped:
            self.standing = Standing(None, run.checkpoint)
        if self._said is not None:
            self._said.passed = True

    def between(self) -> Operation[None]:
        """Have it stand between two forwards: finish the one it stopped in."""
        self._check_open()
        self.leave()
        here = self.standing
        if here.checkpoint is not None:
            yield from here.checkpoint._resume(here.edits, here.hidden, NOTHING, None)
            self.standing = Standing(self.standing.mark, pending=here.pending, saved=here.saved)

    def leave(self) -> None:
        """A generation that is not over is left where its last token was taken."""
        if self._said is not None:
            said, self._said = self._said, None
            said.leave()

    def says(self, said: Said) -> None:
        """A generation begins."""
        self._check_open()
        self.leave()
        self._said = said

    def has_said(self, said: Said, standing: Standing | None) -> None:
        """A generation is over: where it stands then; None: where it stood."""
        if self._said is said:
            self._said = None
        if standing is not None:
            self.standing = standing

    # ---- its end

    def away(self, expected_s: float) -> Any:
        """A hint: it pauses for about so long. What it has kept gives way first where memory is
        needed; nothing is lost."""
        return self.drive(tiers.away(self, expected_s))

    def back_soon(self) -> Any:
        """A hint: it is about to go on. What it has kept is brought up meanwhile."""
        return self.drive(tiers.back_soon(self))

    def close(self) -> Any:
        """End it: what it still does is cancelled, its checkpoints, keys and values released."""
        return self.drive(self.end())

    def end(self) -> Operation[None]:
        if self._closed.detach() is not None and not self.connection.closed:
            try:
                self.leave()
                self.connection.lanes.forget(self.id)
                yield Call(Op.CLOSE, messages.Close(), session=self.id, timeout_s=CLOSE_S)
            except BaseException:  # Busy, or a KeyboardInterrupt: said with the next request
                self.connection.leftovers.add(self.id, 0)
                raise

    def drop(self) -> None:
        """End it without a word: that goes with the next request."""
        self._closed()

    def _check_open(self) -> None:
        if not self._closed.alive:
            raise Closed("the session is closed")

    def __repr__(self) -> str:
        return f"<session on {self.model.name}: {counted(len(self.standing.ids), 'token')}>"
