"""What a run's checkpoints hold on the server."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from djinn_zmq.client.run import Checkpoint

KEPT, SESSION = 5, 7


class Interrupting:
    """What is kept, and a KeyboardInterrupt while a checkpoint is made of it."""

    session, interrupted = SESSION, False

    @property
    def id(self) -> int:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return KEPT


def test_a_checkpoint_that_is_half_made_is_released() -> None:
    forgotten: list[tuple[int, int]] = []
    session: Any = SimpleNamespace(
        connection=SimpleNamespace(forget=lambda *one: forgotten.append(one))
    )
    kept: Any = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        Checkpoint(session, kept, np.zeros((1, 1), np.int64))
    gc.collect()
    assert forgotten == [(SESSION, KEPT)]
