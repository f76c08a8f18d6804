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
from djinn_zmq.client.run import Checkpoint, Run, as_hidden
from djinn_zmq.client.server import Server
from djinn_zmq.client.sweep import Sweep
from djinn_zmq.client.trace import Trace
from djinn_zmq.errors import EditError
from djinn_zmq.wire.tensors import DTYPES

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
    leftovers = SimpleNamespace(add=lambda *one: forgotten.append(one))
    session: Any = SimpleNamespace(connection=SimpleNamespace(leftovers=leftovers))
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


def test_a_replacement_of_another_dtype_is_refused_with_how_to_convert_what_was_given() -> None:
    torch = pytest.importorskip("torch")
    bfloat16, ones = DTYPES["bfloat16"], np.ones(3, np.float32)
    for given, how in (
        (ones, ".astype(checkpoint.dtype)"),
        (torch.ones(3), ".to(torch.bfloat16)"),
        (ones.tolist(), "np.array(…, checkpoint.dtype)"),
    ):
        with pytest.raises(
            EditError, match=r"hidden is float\d+, the checkpoint bfloat16: .*" + re.escape(how)
        ):
            as_hidden(given, bfloat16)
    assert as_hidden(torch.ones(3).bfloat16(), bfloat16).tolist() == [1, 1, 1]
    assert as_hidden(ones.astype(bfloat16), bfloat16).dtype == bfloat16
