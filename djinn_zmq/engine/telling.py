"""What an engine tells the server unasked: what is kept, what has moved, what conversations hold.

A notice lies there before an answer that is sent after it, so that the server knows of a checkpoint before
its client can ask for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from djinn_zmq.engine.answers import Answers
from djinn_zmq.engine.jobs.job import EngineSession
from djinn_zmq.engine.state.keeping import Keeping
from djinn_zmq.wire import messages, talks
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import inline
from djinn_zmq.wire.tiers import Moved


class Telling:
    def __init__(
        self, answers: Answers, keeping: Keeping, sessions: Mapping[int, EngineSession]
    ) -> None:
        self._answers = answers
        self._keeping = keeping
        self._sessions = sessions

    def kept(self, ids: np.ndarray, kept: Sequence[Kept], session: EngineSession) -> None:
        """These are kept for *session*, of a run of *ids*, int64 (batch, positions); what has moved
        before that as well."""
        self.moves()
        if kept:  # ids inside the meta: they outlive this process in the server's books
            # One prompt's are one array, and mostly it is the same one.
            known = session.told_ids is ids
            keep = messages.Keep(None if known else inline(ids), tuple(kept))
            self._answers.tell(Op.KEEP, keep, session.id)
            session.told_ids = ids  # now: what was not told is not known

    def moves(self) -> None:
        """Where checkpoints, and keys and values, have gone since it was told last."""
        keeping, vault = self._keeping, self._keeping.vault
        if keeping.moves:
            moves, keeping.moves = keeping.moves, []
            for entry, how, elapsed_ns in moves:
                self._answers.tell(Op.MOVED, Moved(entry.kept, how, elapsed_ns), entry.session)
        if vault.moves:
            moved, vault.moves = vault.moves, []
            for one in moved:
                session = self._sessions.get(one.session)
                nbytes = session.account.nbytes if session is not None else 0
                held = talks.Held(nbytes, one.how, one.nbytes, one.elapsed_ns)
                self._answers.tell(Op.HELD, held, one.session)

    def held(self, session: EngineSession) -> None:
        """How much its conversations hold, where that has changed."""
        if session.account.nbytes != session.told_nbytes:
            session.told_nbytes = session.account.nbytes
            self._answers.tell(Op.HELD, talks.Held(session.told_nbytes), session.id)
