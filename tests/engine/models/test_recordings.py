"""Which recordings are kept for the next resume."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.models import recordings as room
from djinn_zmq.engine.models.recordings import Recordings


class Model:
    """Counts what it records: *nbytes* each."""

    device = "cpu"

    def __init__(self, name: str, nbytes: int = 10) -> None:
        self.info = SimpleNamespace(name=name)
        self.stepper = self
        self.recorded: list[list[list[int]]] = []
        self.nbytes = nbytes

    def record(self, tokens: Any) -> Any:
        self.recorded.append(tokens.tolist())
        return SimpleNamespace(nbytes=self.nbytes)


def of(recordings: Recordings, model: Any, *rows: list[int]) -> Any:
    return recordings.of(model, np.array(rows, np.int64))


def test_a_prompt_is_recorded_once_and_for_its_own_model_and_shape() -> None:
    recordings, one, two = Recordings(), Model("one"), Model("two")
    first = of(recordings, one, [1, 2])
    assert of(recordings, one, [1, 2]) is first and one.recorded == [[[1, 2]]]
    for model, rows in ((two, [[1, 2]]), (one, [[1], [2]]), (one, [[2, 1]])):
        of(recordings, model, *rows)
    assert len(one.recorded) == 3 and len(two.recorded) == 1


def test_what_was_not_used_for_longest_is_let_go_and_the_last_is_kept_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "LIMIT", 30)
    recordings, model = Recordings(), Model("one")
    for number in (1, 2, 3, 1, 4):  # the fourth takes the place of 2
        of(recordings, model, [number])
    assert model.recorded == [[[1]], [[2]], [[3]], [[4]]]
    of(recordings, model, [3])
    of(recordings, model, [1])
    assert len(model.recorded) == 4
    of(recordings, model, [2])  # and this that of 4
    of(recordings, model, [4])
    assert len(model.recorded) == 6
    model.nbytes = 100
    of(recordings, model, [5])
    of(recordings, model, [5])
    assert len(model.recorded) == 7
    model.nbytes = 10
    of(recordings, model, [6])  # the large one goes: there is room for three again
    of(recordings, model, [7])
    of(recordings, model, [8])
    for number in (6, 7, 8):
        of(recordings, model, [number])
    assert len(model.recorded) == 10
