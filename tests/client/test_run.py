"""What a run's checkpoints hold on the server."""

import gc
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import djinn_zmq as djinn
from djinn_zmq.client.arrays import RemoteArray
from djinn_zmq.client.attach import Attached
from djinn_zmq.client.generation import Generation
from djinn_zmq.client.marks import Mark
from djinn_zmq.client.model import Model
from djinn_zmq.client.run import Checkpoint, Run
from djinn_zmq.client.server import Server
from djinn_zmq.client.sweep import Sweep
from djinn_zmq.client.trace import Trace

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


@pytest.mark.parametrize(
    "kind", [Checkpoint, Run, RemoteArray, Server, Model, Mark, Generation, Sweep, Trace, Attached, djinn.Add, djinn.Break]
)  # fmt: skip
def test_what_tab_completion_shows_is_for_who_uses_it_and_no_inner_step(kind: type) -> None:
    for name, member in inspect.getmembers(kind):
        value = member.fget if isinstance(member, property) else member
        if not name.startswith("_") and inspect.isfunction(value):
            gives = str(value.__annotations__.get("return"))
            assert not re.search(r"Operation|wire\.(edits|stops)", gives), name
