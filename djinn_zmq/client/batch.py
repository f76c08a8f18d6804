"""Many prompts at once, of any lengths: each is run as if it were alone, several on the way at a time.

Nothing is padded, and rows share no matrix product: what a prompt gives does not depend on what is
asked beside it, not by a bit. (A batch of one length in `Model.run` is one forward pass: faster on a
GPU, and rounded as that shape is.)
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

from djinn_zmq.client import checks
from djinn_zmq.client.calls import Call, Operation
from djinn_zmq.client.edits import Edit, each_of
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.session import Session
from djinn_zmq.client.stops import Logits, wanted_of
from djinn_zmq.errors import DjinnError, RequestError
from djinn_zmq.settings import counted
from djinn_zmq.wire.codec import Message

T = TypeVar("T")

Edits = Edit | Sequence[Edit] | None  # of one prompt


class Batch(Sequence[Run]):
    """Runs of many prompts, in their order."""

    def __init__(self, session: Session, runs: Sequence[Run]) -> None:
        self._session = session
        self._runs = list(runs)

    @overload
    def __getitem__(self, place: int) -> Run: ...
    @overload
    def __getitem__(self, place: slice) -> "Batch": ...
    def __getitem__(self, place: int | slice) -> "Run | Batch":
        if isinstance(place, slice):
            return Batch(self._session, self._runs[place])
        return self._runs[place]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Of each run the one it stopped at, or else the last it saved."""
        return [run.checkpoint for run in self._runs]

    def top(self, k: int = 5) -> Any:
        """Of each prompt the *k* likeliest next tokens: a list of lists of `Top`."""
        return self._session.drive(together(self._session, [run._top(k, 0) for run in self._runs]))

    def resume(
        self,
        edits: Edit | Sequence[Edits] | None = None,
        *,
        stop_at: Any = None,
        save_at: Any = (),
        logits: Logits = "last",
        timeout_s: float | None = None,
    ) -> Any:
        """Go on from each `checkpoint`, with edits of its own: a new Batch.

        edits: for each prompt its edits (or one, or None), as many as there are prompts; or one edit
        for all. The rest as in `Checkpoint.resume`.
        """
        each = edits_of_each(edits, len(self))
        depth = self._session.model.num_layers
        return self._session.drive(
            made(
                self._session,
                [
                    point._resume(
                        own,
                        None,
                        wanted_of(stop_at, save_at, logits, point.layer, depth, point.place),
                        timeout_s,
                    )
                    for point, own in zip(self.checkpoints, each, strict=True)
                ],
            )
        )

    def __repr__(self) -> str:
        return f"<batch of {counted(len(self), 'run')}>"


def made(session: Session, operations: Sequence[Operation[Run]]) -> Operation[Batch]:
    return Batch(session, (yield from together(session, operations)))


def together(session: Session, operations: Sequence[Operation[T]]) -> Operation[list[T]]:
    """Several operations at once: what they ask is on its way together. All fail if one does."""
    results: dict[int, T] = {}
    asked: dict[int, Call] = {}
    replies: deque[Message] = deque()  # that have come, and nobody has yet

    def advance(place: int, go_on: Callable[[], Any]) -> None:
        try:
            asked[place] = go_on()
        except StopIteration as end:
            asked.pop(place, None)
            results[place] = end.value
        except DjinnError as exc:
            exc.add_note(f"in prompt {place} of {len(operations)}, counted from 0")
            raise

    try:
        for place, operation in enumerate(operations):
            advance(place, operation.__next__)
        while asked:
            places = list(asked)
            replies.extend((yield list(asked.values())))
            for place in places:
                reply = replies.popleft()
                advance(place, lambda place=place, reply=reply: operations[place].send(reply))
    finally:
        for reply in replies:  # one before them failed
            session.connection.give_back(reply)
        for operation in operations:
            operation.close()
    return [results[place] for place in range(len(operations))]


def edits_of_each(edits: Edit | Sequence[Edits] | None, count: int) -> list[Sequence[Edit]]:
    """The edits of each of *count* prompts. Raises RequestError where they are not as many."""
    if edits is None or hasattr(edits, "_on_wire"):
        return [() if edits is None else [edits]] * count
    each = checks.several("edits", edits, "for each prompt its own, a list or None; or one for all")
    if len(each) != count:
        raise RequestError(
            f"edits for {counted(len(each), 'prompt')}, not for {count}: for each its own, a list or None"
        )
    return [() if own is None else list(each_of(own)) for own in each]
