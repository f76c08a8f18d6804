"""One session on one model, and how its requests are asked. What runs and models share."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from djinn_zmq.client.calls import Call, Operation, Progress
from djinn_zmq.client.connection import Connection
from djinn_zmq.errors import RequestError
from djinn_zmq.wire import messages
from djinn_zmq.wire.messages import ModelInfo
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import inline

PIECES_AT_ONCE = 256  # int64 ids of one request: as many fit inside a meta


S = TypeVar("S", bound="Session")


def opened(
    connection: Connection,
    model: str,
    progress: Progress | None,
    make: Callable[[messages.Opened], S],
) -> Operation[S]:
    """Open a session on *model*: what *make* makes of it. Raises UnknownModel, ModelRefused, Lost."""
    reply = yield Call(Op.OPEN, messages.Open(model), progress=progress)
    try:
        return make(reply.meta)
    except BaseException:  # a KeyboardInterrupt: nobody will refer to it
        connection.give_back(reply)
        raise


class Session:
    """drive: runs an operation; in asyncio code it returns an awaitable of the outcome.
    progress: is told when a request waits for an engine to start."""

    def __init__(
        self,
        connection: Connection,
        drive: Callable[[Operation[Any]], Any],
        progress: Progress | None,
        opened: messages.Opened,
    ) -> None:
        self.connection = connection
        self.drive = drive
        self.progress = progress
        self.id: int = opened.session
        self.engine: int = opened.engine  # its index
        connection.lanes.know(opened.session, opened.engine)
        self.model: ModelInfo = opened.model
        self._pieces: dict[int, str] = {}

    def stand_at(self, run: Any) -> None:
        """*run* went on from one of this session's checkpoints: that matters to a conversation."""

    def generate_from(self, checkpoint: Any, *_: Any, **__: Any) -> Any:
        raise RequestError(
            "a plain run's checkpoint has no past to generate from: run its prompt in a session, "
            "model.session()"
        )

    def pieces_of(self, ids: np.ndarray) -> Operation[list[str]]:
        """Each id's text, asked for once; "" where the model has no tokenizer."""
        numbers = [int(number) for number in ids]
        if self.model.has_tokenizer:
            missing = [number for number in numbers if number not in self._pieces]
            for start in range(0, len(missing), PIECES_AT_ONCE):
                part = missing[start : start + PIECES_AT_ONCE]
                meta = messages.Tokens("", inline(np.array(part, np.int64)))
                reply = yield Call(Op.TOKENS, meta, session=self.id)
                self._pieces.update(zip(part, reply.meta.pieces, strict=True))
        return [self._pieces.get(number, "") for number in numbers]
