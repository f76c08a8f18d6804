"""What travels with a request comes back when that is answered, and when it never will be."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from djinn_zmq.client import tiers
from djinn_zmq.client.calls import Operation
from djinn_zmq.client.forwards import Asked, forward
from djinn_zmq.client.parcels import Parcel
from djinn_zmq.errors import Lost
from djinn_zmq.memory import files
from djinn_zmq.wire.ops import Op
from tests.client.test_parts import IT

IDS = np.zeros((1, 3), np.int64)


def saved(path: Path) -> Path:
    tensors = {"hidden": np.ones((1, 3, 1), np.float32), "ids": IDS}
    files.write(path, tensors, {"format": files.FORMAT, "layer": "1"} | files.facts_of(IT))
    return path


@pytest.fixture
def session() -> Any:
    sharing = SimpleNamespace(lease=None)
    return SimpleNamespace(connection=SimpleNamespace(sharing=sharing), id=7, model=IT, progress=None)  # fmt: skip


@pytest.mark.parametrize("op", [Op.FORWARD, Op.RESTORE])
@pytest.mark.parametrize("error", [Lost("its engine died"), KeyboardInterrupt()])
def test_what_travels_with_a_request_that_fails_comes_back(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: Op, error: BaseException
) -> None:
    back: list[Parcel] = []
    monkeypatch.setattr(Parcel, "settle", lambda parcel: back.append(parcel))
    operation: Operation[Any] = (
        forward(session, Asked(IDS))
        if op == Op.FORWARD
        else tiers.load(session, saved(tmp_path / "point.safetensors"))
    )
    call: Any = next(operation)
    assert call.op == op and not back
    with pytest.raises(type(error)):
        operation.throw(error)
    assert len(back) == 1
