"""What an engine's loop does beside requests."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.devices import Broken, Cpu
from djinn_zmq.engine.loop import EngineLoop
from djinn_zmq.engine.working import Work


class Dying(Cpu):
    def broken(self, error: BaseException) -> str:
        return "its CUDA context is poisoned" if "CUDA" in str(error) else ""


@pytest.mark.parametrize(("text", "ends_as"), [("CUDA error", Broken), ("a mistake", RuntimeError)])
def test_a_device_found_broken_by_a_copy_that_nobody_waits_for_is_said_to_be(
    text: str, ends_as: type[Exception]
) -> None:
    def fill() -> None:
        raise RuntimeError(text)

    nothing: Any = None
    loop: Any = SimpleNamespace(
        _keeping=SimpleNamespace(tiers=SimpleNamespace(fill=fill)),
        _work=Work(nothing, nothing, nothing, nothing, nothing, nothing, Dying()),
    )
    with pytest.raises(ends_as):
        EngineLoop._fill(loop)
