"""A model on a server, as a client sees it."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from djinn_zmq.client import checks, tiers
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.connection import Connection
from djinn_zmq.client.edits import Edit, placed_edits
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.client.prompts import Prompt, as_int64, ids_of, texts_of
from djinn_zmq.client.run import Checkpoint, Run, ask
from djinn_zmq.client.session import Session as Channel
from djinn_zmq.client.session import opened
from djinn_zmq.client.stops import Logits, wanted_of
from djinn_zmq.client.tiers import Returned
from djinn_zmq.errors import NoSessions, PromptError
from djinn_zmq.settings import counted
from djinn_zmq.wire import messages
from djinn_zmq.wire.messages import ModelInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import view

# Rooms that a first stop and resume do without are imported where they are entered.
if TYPE_CHECKING:
    from djinn_zmq.client.forwards import Asked
    from djinn_zmq.client.talk import Session
    from djinn_zmq.client.trace import Trace

# A member that is looked up in its enum with each request costs 9 us where that is cold.
PING, RUN, TOKENS = Op.PING, Op.RUN, Op.TOKENS


class Model:
    """A served model and this client's session on it.

    name, num_layers, hidden_size, vocab_size, dtype, device, has_tokenizer: of the model.
    info: all that is known of it.
    """

    def __init__(self, server: Any, session: Channel, on_close: Callable[["Model"], None]) -> None:
        """server: the `Server` it was opened on. on_close: told when the session is closed."""
        self.server = server
        self.session_id: int = session.id
        self.info: ModelInfo = session.model
        self.name: str = self.info.name
        self.num_layers: int = self.info.num_layers
        self.hidden_size: int = self.info.hidden_size
        self.vocab_size: int = self.info.vocab_size
        self.dtype: str = self.info.dtype
        self.device: str = self.info.device
        self.has_tokenizer: bool = self.info.has_tokenizer
        self.connection: Connection = session.connection
        self.drive = session.drive
        self._session = session
        self._on_close = on_close
        self._open = True

    def run(
        self,
        prompt: Prompt,
        *,
        edits: Sequence[Edit] | Edit = (),
        stop_at: Any = None,
        save_at: Any = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> Run:
        """One forward pass over *prompt*.

        prompt: text, a list of texts of one length, or token ids (int array (positions,) or
        (batch, positions)).
        edits: of what flows into the first layer; a `Skip` leaves out a layer.
        stop_at: stop after this many layers and keep a checkpoint; 0: after the embedding. Or at a
        module's path, on a condition (`Break`), or at the first of several of these.
        save_at: keep a checkpoint at each of these on the way: numbers, paths; "all": after every
        layer.
        logits: "last" position's, "all" positions', "none", or a number: only that many of the
        last position's likeliest. timeout_s: cancel the run after so many seconds; what is
        uploaded for it may take as long.
        Raises PromptError, LayerError, StopError, EditError, NoTokenizer, ArenaFull, DeadlineExceeded, Lost.
        """
        wanted = wanted_of(stop_at, save_at, logits, 0, self.num_layers)
        return self.drive(self._run(prompt, edits, wanted, timeout_s))

    def _run(
        self,
        prompt: Prompt,
        edits: Sequence[Edit] | Edit,
        wanted: messages.Wanted,
        timeout_s: float | None,
    ) -> Operation[Run]:
        parcel = Parcel(self.connection, self.session_id, timeout_s)
        try:
            texts = texts_of(prompt)
            ids = None
            if not texts:
                ids = yield from parcel.place(ids_of(prompt))
            on_wire = yield from placed_edits(edits, parcel, self.dtype)
            meta = messages.Run(texts, ids, wanted, on_wire)
            return (yield from ask(self._session, RUN, meta, parcel, timeout_s))
        finally:
            parcel.settle()

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        edits: Any = None,
        stop_at: Any = None,
        save_at: Any = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> Any:
        """Run many prompts of any lengths, each bit for bit as if it were alone: a `Batch` of runs.

        prompts: texts, or lists of token ids. edits: for each prompt its own, or None, as many as
        there are prompts; or one edit for all. The rest as in `run`.
        Where one is refused all are; the error has a note that says which.
        """
        from djinn_zmq.client.batch import edits_of_each, made

        wanted = wanted_of(stop_at, save_at, logits, 0, self.num_layers)
        allowed = "a list of prompts, at least one"
        prompts = checks.several("prompts", prompts, allowed, kind=PromptError)
        if not prompts:
            raise PromptError(f"prompts=[]: {allowed}")
        each = edits_of_each(edits, len(prompts))
        return self.drive(
            made(
                self._session,
                [
                    self._run(prompt, own, wanted, timeout_s)
                    for prompt, own in zip(prompts, each, strict=True)
                ],
            )
        )

    def session(self, *, static: int = 0) -> Any:
        """Open a conversation of its own, with a KV cache: a `Session`, for a `with` block.

        static: positions of a static cache, as transformers' StaticCache; 0: one that grows.
        Raises NoSessions for a model whose cached steps are not exact.
        """
        allowed = "a number of positions, or 0 for a cache that grows"
        static = checks.whole("static", static, least=0, allowed=allowed)
        return self.drive(self._open_session(static))

    def _open_session(self, static: int) -> Operation["Session"]:
        from djinn_zmq.client.talk import Session

        if self.info.no_sessions:
            raise NoSessions(f'"{self.name}" serves no sessions: {self.info.no_sessions}')
        connection, drive, progress = self.connection, self.drive, self._session.progress
        make = partial(Session, connection, drive, progress, static=static)
        session = yield from opened(connection, self.name, progress, make)
        self.server.conversations.add(session)
        return session

    def trace(
        self,
        clean: Prompt,
        corrupted: Prompt,
        layers: int | Sequence[int] | None = None,
        positions: Any = None,
        *,
        tokens: Any = None,
        logits: Any = "none",
        memory: int | None = None,
        timeout_s: float | None = None,
    ) -> "Trace":
        """The causal-tracing grid: iterate for its cells as they come; `finish()` gives the `Grid`.

        Each cell is the corrupted prompt's run with the clean one's hidden state after a layer, at
        a position. Both prompts have as many tokens.
        layers: as stops count; by default all, 0 included. positions: ints, or groups of them that
        are patched together; by default each by itself. tokens: texts or ids whose probabilities
        are wanted; by default the likeliest of the clean run and of the corrupted one. logits,
        memory: as in `Checkpoint.sweep`.
        Raises, when iterated, PromptError, LayerError, SweepTooLarge.
        """
        from djinn_zmq.client.sweep import memory_of
        from djinn_zmq.client.trace import Trace

        return Trace(
            self._session,
            (clean, corrupted),
            layers,
            positions,
            tokens,
            logits,
            memory_of(memory),
            timeout_s,
        )

    def forward(self, asked: "Asked") -> Any:
        """The model's forward as transformers has it: what `djinn_zmq.hf` asks for."""
        from djinn_zmq.client.forwards import forward

        return self.drive(forward(self._session, asked))

    def card(self) -> Any:
        """The files of its config and tokenizer, and its attention implementation."""
        from djinn_zmq.client.forwards import card

        return self.drive(card(self._session))

    def ping(self) -> Any:
        """To the model's engine and back: "idle" or "running"."""
        return self.drive(self._ping())

    def _ping(self) -> Operation[str]:
        reply = yield Call(PING, messages.Ping(), session=self.session_id)
        return reply.meta.state

    def tokens(self, text: str) -> Any:
        """The pieces *text* is cut into: list of str."""
        return self.drive(self._tokens(checks.text("text", text)))

    def _tokens(self, text: str) -> Operation[list[str]]:
        reply = yield Call(TOKENS, messages.Tokens(text, None), session=self.session_id)
        return list(reply.meta.pieces)

    def encode(self, text: str) -> Any:
        """The token ids of *text*: int64 (positions,)."""
        return self.drive(self._encode(checks.text("text", text)))

    def _encode(self, text: str) -> Operation[np.ndarray]:
        reply = yield Call(TOKENS, messages.Tokens(text, None), session=self.session_id)
        return np.array(view(reply.meta.ids, reply.buffers))

    def pieces(self, ids: Any) -> Any:
        """Each token's own text: a list of str for ids (tokens,); "" without a tokenizer."""
        found = checks.array("ids", ids, kind=PromptError)
        if found.size and found.dtype.kind not in "iu":
            raise PromptError(f"ids={checks.shown(ids)}: whole numbers")
        return self.drive(self._session.pieces_of(as_int64(found.reshape(-1))))

    def load_checkpoint(self, path: str | os.PathLike[str]) -> Any:
        """A checkpoint of this model out of the file that `Checkpoint.save` wrote.

        Raises BadFile for what is no such file, or is of another model, naming the difference.
        """
        return self.drive(self._load_checkpoint(checks.path("path", path)))

    def _load_checkpoint(self, path: Path) -> Operation[Checkpoint]:
        reply, ids = yield from tiers.load(self._session, path)
        try:
            return Checkpoint(self._session, reply.meta.kept, ids)
        except BaseException:  # a KeyboardInterrupt: nobody will refer to it
            self.connection.give_back(reply)
            raise

    def returned(self) -> Any:
        """Your checkpoints of this model that came back from the disk when the server started, and
        that no session has. They stay, and take room of --disk, until one does: a list with .id, .layer,
        .shape, .dtype, .nbytes. `checkpoint` takes one up again."""
        return self.drive(self._returned())

    def _returned(self) -> Operation[list[Returned]]:
        reply = yield from tiers.claim(self._session, ())
        return [Returned.of(kept) for kept in reply.kept]

    def checkpoint(self, number: Any) -> Any:
        """Take up one of those that `returned` lists, or its number: it is this session's then, and goes
        with it, its file too, when it is released, or the session ends before the server does. `save` it
        to keep it longer."""
        allowed = "one of model.returned(), or its id"
        number = number.id if isinstance(number, Returned) else number
        number = checks.whole("number", number, least=1, most=2**64 - 1, allowed=allowed)
        return self.drive(self._checkpoint(number))

    def _checkpoint(self, number: int) -> Operation[Checkpoint]:
        reply = yield from tiers.claim(self._session, (number,))
        return Checkpoint(self._session, reply.kept[0], np.array(view(reply.ids[0], ())))

    def away(self, expected_s: float) -> Any:
        """A hint: this session pauses for about so long. What it has kept gives way first where
        memory is needed; nothing is lost."""
        return self.drive(tiers.away(self._session, expected_s))

    def back_soon(self) -> Any:
        """A hint: this session is about to go on. What it has kept is brought up meanwhile."""
        return self.drive(tiers.back_soon(self._session))

    def close(self) -> Any:
        """End the session: its runs are cancelled, its checkpoints released. Once more does nothing."""
        return self.drive(self._close())

    def _close(self) -> Operation[None]:
        if not self._open or self.connection.closed:
            return
        self._open = False
        try:
            self._on_close(self)
            self.connection.lanes.forget(self.session_id)
            yield Call(Op.CLOSE, messages.Close(), session=self.session_id)
        except BaseException:  # Busy, or a KeyboardInterrupt: said with the next request
            self.connection.leftovers.add(self.session_id, 0)
            raise

    def __repr__(self) -> str:
        return (
            f"<model {self.name}: {self.info.architecture}, {counted(self.num_layers, 'layer')}, "
            f"hidden size {self.hidden_size}, {self.dtype} on {self.device}>"
        )
