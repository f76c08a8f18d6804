"""Slots that somebody is not through with: free when he is, and not before."""

from types import SimpleNamespace
from typing import Any

import pytest

from djinn_zmq.engine.state.leaving import Leaving

SLOT: Any = SimpleNamespace(where="a slot")


class Waited:
    """What is waited for: holds, or does not yet."""

    def __init__(self) -> None:
        self.holds = False

    def __call__(self) -> bool:
        return self.holds


@pytest.fixture
def rooms() -> tuple[Leaving, list[str], list[Waited]]:
    """And what was given back, and what the device was asked when it is through with."""
    freed: list[str] = []
    asked: list[Waited] = []

    def computed() -> Waited:
        asked.append(Waited())
        return asked[-1]

    device: Any = SimpleNamespace(computed=computed)
    slabs: Any = SimpleNamespace(give_back=freed.append)
    return Leaving(device, slabs), freed, asked


def test_what_is_waited_for_frees_each_slot_by_itself_and_once(rooms) -> None:
    leaving, freed, _ = rooms
    first, second = Waited(), Waited()
    leaving.free_when(first, lambda: freed.append("first"))
    leaving.free_when(second, lambda: freed.append("second"))
    leaving.settle()
    assert freed == [] and leaving and leaving.soon
    second.holds = True
    leaving.settle()
    leaving.settle()
    assert freed == ["second"] and leaving.soon
    first.holds = True
    leaving.settle()
    assert freed == ["second", "first"] and not leaving and not leaving.soon


def test_what_a_client_wrote_into_waits_for_its_end_and_then_for_what_the_device_had_begun(
    rooms,
) -> None:
    leaving, freed, asked = rooms
    gone, read = Waited(), Waited()
    leaving.free_after(SLOT, gone, read)
    gone.holds = True
    leaving.settle()
    assert not asked and leaving and not leaving.soon  # clients end when they like
    read.holds = True
    leaving.settle()
    leaving.settle()
    assert len(asked) == 1 and freed == []
    asked[0].holds = True
    leaving.settle()
    assert freed == ["a slot"] and not leaving


def test_what_nobody_uses_any_more_is_free_at_once(rooms) -> None:
    leaving, freed, asked = rooms
    leaving._device.computed = lambda: lambda: True
    leaving.free_after(SLOT, None, lambda: True)
    leaving.free_when(None, lambda: freed.append("another"))
    leaving.free_when(lambda: True, lambda: freed.append("a third"))
    assert freed == ["a slot", "another", "a third"] and not leaving and not asked
