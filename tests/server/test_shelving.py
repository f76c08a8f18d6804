"""Which checkpoints engines are told to write before the end, and what is said of the others."""

import logging
from typing import Any

import pytest

from djinn_zmq.server.engines import Engine
from djinn_zmq.server.registry import KeptRecord, Registry, Session
from djinn_zmq.server.shelving import Shelving
from djinn_zmq.settings import Settings
from djinn_zmq.wire import states
from djinn_zmq.wire.tensors import Slot, Tensor
from djinn_zmq.wire.tiers import Kept, Shelve, Shelved

SETTINGS = Settings(state="the state directory")
INSIDE = "they are inside a layer, or the model's ends, and need more than a file holds"


class Told(Engine):
    """An engine with nothing behind it."""

    def __init__(self, index: int, state: states.Engine = states.Engine.READY) -> None:
        super().__init__(index, "cpu", "auto", SETTINGS)
        self.state = state
        self.asked: list[tuple[int, ...]] = []

    def tell(self, op: int, meta: Any, *, session: int = 0, request: int = 0) -> None:
        assert isinstance(meta, Shelve)
        self.asked.append(meta.ids)


def session(registry: Registry, number: int, engine: int, *kepts: Kept, owner: str = "me") -> None:
    one = registry.sessions[number] = Session(number, owner, "tiny", engine, None)
    for kept in kepts:
        one.kept[kept.id] = KeptRecord(kept, kept.tensor)


def kept(number: int, layer: int = 2, past: int = 0, place: str = "", base: int = 0, **more: Any):
    where = Tensor("uint8", (8,), Slot(1, number, 1))
    return Kept(number, 1, 7, layer, where, past, place, base, more.get("tiers", ("host",)))


def test_each_engine_that_is_up_is_told_of_its_own_that_a_file_is_of_use_to_and_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry(9)
    engines = [Told(0), Told(1), Told(2, states.Engine.STARTING), Told(3)]
    session(registry, 1, 0, kept(10), kept(11, tiers=("host", "disk")), kept(12, layer=-1))
    session(registry, 2, 1, kept(20), kept(21, past=3), kept(22, place="layers.1.mlp", base=23))
    registry.sessions[2].kept[23] = KeptRecord(kept(23), kept(23).tensor)  # the input of 22
    session(registry, 3, 2, kept(30))
    session(registry, 4, 3, kept(40, tiers=("disk",)))
    session(registry, 5, 3, kept(50), owner="tcp:4711")
    shelving = Shelving(engines, registry, SETTINGS)
    shelving.begin()
    assert [one.asked for one in engines] == [[(10,)], [(20,)], [], []]
    assert shelving.waiting == {0, 1}
    shelving.gone(engines[1])
    shelving.heard(engines[0], Shelved(((10, "the disk is full"),)))
    assert not shelving.waiting
    with caplog.at_level(logging.INFO):
        shelving.name()
    said = [one.getMessage() for one in caplog.records if "kept" in one.getMessage()]
    assert sorted(said) == [
        "kept in the state directory: 2 checkpoints",
        "not kept: 1 checkpoint: connections without a key are over with the server: 32",
        "not kept: 1 checkpoint: the disk is full: a",
        f"not kept: 1 checkpoint: {INSIDE}: 16",
        "not kept: 1 checkpoint: they go on from keys and values, which are no part of a file: 15",
        "not kept: 2 checkpoints: there was no time: 14, 1e",
    ]
