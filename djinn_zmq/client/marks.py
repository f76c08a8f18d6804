"""Where a conversation stands between two forwards, kept on the server as long as somebody cares."""

from typing import Any

import numpy as np

from djinn_zmq.client.arrays import read_only
from djinn_zmq.client.connection import Connection
from djinn_zmq.settings import counted


class Mark:
    """A place in a conversation: go on from it any number of times with `Session.back(mark)`.

    checkpoint: the last one on the way, or None.
    """

    number = 0  # of one that was never made whole: it holds nothing

    def __init__(
        self,
        connection: Connection,
        session: int,
        number: int,
        ids: np.ndarray,
        checkpoint: Any,
        unrun: int = 0,
    ) -> None:
        """unrun: how many of *ids*, at their end, have no keys and values yet: a generation's last token,
        which is the first of the next forward's own."""
        self.session = session
        self.number = number
        self._ids = ids
        self.checkpoint = checkpoint
        self._unrun = unrun
        self._connection = connection

    @property
    def ids(self) -> np.ndarray:
        """All tokens up to here: int64 (positions,), not to be written into."""
        return read_only(self._ids)

    @property
    def past(self) -> np.ndarray:
        """The tokens before the next forward's own: int64 (positions,), not to be written into."""
        return self.ids[: len(self._ids) - self._unrun]

    def __del__(self) -> None:  # of each forward of a conversation: as a `Checkpoint`'s
        if self.number:
            self._connection.leftovers.add(self.session, self.number)

    def __copy__(self) -> "Mark":
        return self

    def __repr__(self) -> str:
        return f"<mark after {counted(len(self._ids), 'token')}>"
