"""A model on a server, as a client sees it."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from djinn_zmq.client.connection import Call, Connection, Operation, Parcel
from djinn_zmq.client.run import Logits, Run, wanted_of
from djinn_zmq.errors import EditError, PromptError
from djinn_zmq.spans import Spans
from djinn_zmq.wire import messages
from djinn_zmq.wire.messages import ModelInfo, Op
from djinn_zmq.wire.tensors import dtype_name, inline, view

if TYPE_CHECKING:
    from djinn_zmq.client.server import Server

Prompt = Any  # str, list of str, or token ids: (positions,) or (batch, positions)


class Model:
    """A served model and this client's session on it.

    name, num_layers, hidden_size, vocab_size, dtype, device, has_tokenizer: of the model.
    info: all that is known of it.
    """

    def __init__(self, server: "Server", opened: messages.Opened) -> None:
        self.server = server
        self.session: int = opened.session
        self.info: ModelInfo = opened.model
        self.name: str = opened.model.name
        self.num_layers: int = opened.model.num_layers
        self.hidden_size: int = opened.model.hidden_size
        self.vocab_size: int = opened.model.vocab_size
        self.dtype: str = opened.model.dtype
        self.device: str = opened.model.device
        self.has_tokenizer: bool = opened.model.has_tokenizer
        self._pieces: dict[int, str] = {}

    @property
    def connection(self) -> Connection:
        return self.server.connection

    @property
    def drive(self) -> Callable[[Operation[Any]], Any]:
        return self.server.drive

    def run(
        self,
        prompt: Prompt,
        *,
        stop_at: int | None = None,
        save_at: Sequence[int] = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> Run:
        """One forward pass over *prompt*.

        prompt: text, a list of texts of one length, or token ids (int array (positions,) or
        (batch, positions)).
        stop_at: stop after this many layers and keep a checkpoint; 0: after the embedding.
        save_at: keep a checkpoint after each of these on the way.
        logits: "last" position's, "all" positions', "none", or a number: only that many of the
        last position's likeliest. timeout_s: cancel the run after so many seconds.
        Raises PromptError, LayerError, NoTokenizer, ArenaFull, DeadlineExceeded, Lost.
        """
        return self.drive(self._run(prompt, wanted_of(stop_at, save_at, logits), timeout_s))

    def _run(
        self, prompt: Prompt, wanted: messages.Wanted, timeout_s: float | None
    ) -> Operation[Run]:
        parcel = Parcel(self.session)
        try:
            texts = _texts(prompt)
            ids = None
            if not texts:
                ids = yield from self.connection.place(_ids(prompt), parcel)
            meta = messages.Run(texts, ids, wanted)
            return (yield from self.ask(Op.RUN, meta, parcel, timeout_s))
        finally:
            self.connection.settle(parcel)

    def ask(
        self, op: Op, meta: msgspec.Struct, parcel: Parcel, timeout_s: float | None
    ) -> Operation[Run]:
        """Send a RUN or RESUME and make a Run of the reply."""
        call = Call(
            op,
            meta,
            session=self.session,
            buffers=parcel.buffers,
            timeout_s=timeout_s,
            progress=self.server.progress,
        )
        reply = yield call
        run = Run(self, reply)
        # What the engine did not spend between our sending and the reply's coming is the wire's.
        inside = sum(elapsed_ns for _, elapsed_ns in reply.meta.spans)
        run.spans = Spans(
            (
                ("encode", call.sent_ns - parcel.begin_ns),
                ("wire", max(0, call.arrived_ns - call.sent_ns - inside)),
                *reply.meta.spans,
                ("decode", time.perf_counter_ns() - call.arrived_ns),
            )
        )
        return run

    def ping(self) -> Any:
        """To the model's engine and back: "idle" or "running"."""
        return self.drive(self._ping())

    def _ping(self) -> Operation[str]:
        reply = yield Call(Op.PING, messages.Ping(), session=self.session)
        return reply.meta.state

    def tokens(self, text: str) -> Any:
        """The pieces *text* is cut into: list of str."""
        return self.drive(self._tokens(text))

    def _tokens(self, text: str) -> Operation[list[str]]:
        reply = yield Call(Op.TOKENS, messages.Tokens(text, None), session=self.session)
        return list(reply.meta.pieces)

    def encode(self, text: str) -> Any:
        """The token ids of *text*: int64 (positions,)."""
        return self.drive(self._encode(text))

    def _encode(self, text: str) -> Operation[np.ndarray]:
        reply = yield Call(Op.TOKENS, messages.Tokens(text, None), session=self.session)
        return np.array(view(reply.meta.ids, reply.buffers))

    def pieces_of(self, ids: np.ndarray) -> Operation[list[str]]:
        """Each id's text, asked for once; "" where the model has no tokenizer."""
        numbers = [int(number) for number in ids]
        if self.has_tokenizer:
            missing = [number for number in numbers if number not in self._pieces]
            for start in range(0, len(missing), 256):  # 256 int64 fit inside the meta
                part = missing[start : start + 256]
                meta = messages.Tokens("", inline(np.array(part, np.int64)))
                reply = yield Call(Op.TOKENS, meta, session=self.session)
                self._pieces.update(zip(part, reply.meta.pieces, strict=True))
        return [self._pieces.get(number, "") for number in numbers]

    def as_hidden(self, value: Any) -> np.ndarray:
        """*value* as an array that can travel. Raises EditError for a dtype no tensor has."""
        array = np.asarray(value)
        if dtype_name(array.dtype) is None:
            raise EditError(
                f"hidden of dtype {array.dtype}: it must have the checkpoint's, {self.dtype}"
            )
        return array

    def close(self) -> Any:
        """End the session: its runs are cancelled, its checkpoints released."""
        return self.drive(self._close())

    def _close(self) -> Operation[None]:
        self.server.forget(self)
        yield Call(Op.CLOSE, messages.Close(), session=self.session)

    def __repr__(self) -> str:
        return (
            f"<model {self.name}: {self.info.architecture}, {self.num_layers} layers, "
            f"hidden size {self.hidden_size}, {self.dtype} on {self.device}>"
        )


def _texts(prompt: Prompt) -> tuple[str, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(p, str) for p in prompt):
        return tuple(prompt)
    return ()


def _ids(prompt: Prompt) -> np.ndarray:
    """Token ids as int64 (batch, positions). Raises PromptError."""
    try:
        array = np.asarray(prompt)
    except ValueError as exc:
        raise PromptError(
            "the prompts have different lengths: prompts of one batch must have the same number "
            "of tokens; run them one by one"
        ) from exc
    if array.size == 0:
        raise PromptError("an empty prompt cannot be run")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise PromptError(
            f"a prompt of {array.dtype} and shape {array.shape}: give text, a list of texts, or "
            "int token ids of shape (positions,) or (batch, positions)"
        )
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]), np.int64)
