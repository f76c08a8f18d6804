"""Reading what is kept where it stands in shared memory, while it moves."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from djinn_zmq.client.arrays import TRIES, RemoteArray
from djinn_zmq.client.calls import Call
from djinn_zmq.client.connection import Connection
from djinn_zmq.errors import Lost, ProtocolError, StaleSlot, UnknownCheckpoint
from djinn_zmq.wire.messages import Kept
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Slot, Tensor
from djinn_zmq.wire.tiers import HoldReply, MoveReply

WHOLE = np.arange(8, dtype=np.float32).reshape(1, 2, 4)


def kept(where: Any) -> Kept:
    return Kept(11, 7, 1, 2, Tensor("float32", WHOLE.shape, where))


class Moving:
    """Shared memory of slots that hold WHOLE, each of which is given back while it is copied for the first
    *times*."""

    lease = True

    def __init__(self, times: int) -> None:
        self.times = times
        self.gone: set[Slot] = set()

    def can_map(self, tensor: Tensor) -> bool:
        return isinstance(tensor.where, Slot)

    def arena(self, _: int) -> "Moving":
        return self

    def view(self, slot: Slot, _: int) -> memoryview:
        self.check(slot)
        if self.times:
            self.times -= 1
            self.gone.add(slot)
            return memoryview(np.full(WHOLE.nbytes, 0xFF, np.uint8))  # another's by now
        return memoryview(WHOLE.reshape(-1).view(np.uint8))

    def check(self, slot: Slot) -> None:
        if slot in self.gone:
            raise StaleSlot("it has moved")


class Reading:
    """A client's operations, with a server that says where *kept* is now."""

    def __init__(self, times: int, *, released: bool = False) -> None:
        self.sharing = Moving(times)
        self.asked: list[int] = []
        self._released = released

    def drive(self, operation: Any) -> Any:
        try:
            step = next(operation)
            while True:
                try:
                    reply = self._answer(step)
                except UnknownCheckpoint as exc:
                    step = operation.throw(exc)
                else:
                    step = operation.send(reply)
        except StopIteration as end:
            return end.value

    def _answer(self, call: Call) -> Any:
        self.asked.append(call.op)
        if self._released:
            raise UnknownCheckpoint.numbered(11)
        slot = Slot(1, 0, len(self.asked))
        reply = MoveReply((kept(slot),), ())
        return type("Reply", (), {"meta": reply})

    def array(self) -> RemoteArray:
        return RemoteArray(cast(Connection, self), self.drive, kept(Slot(1, 0, 0)), None)


@pytest.mark.parametrize("times", range(TRIES))
def test_what_moves_while_it_is_copied_is_copied_again_from_where_it_is(times: int) -> None:
    reading = Reading(times)
    np.testing.assert_array_equal(reading.array()[0, -1], WHOLE[0, -1])
    assert reading.asked == times * [Op.WHERE]
    reading, target = Reading(times), np.zeros_like(WHOLE)
    reading.drive(reading.array()._read_into(target))
    np.testing.assert_array_equal(target, WHOLE)


class Pulling(Reading):
    """Over the bus, in one piece of which *missing* bytes do not come."""

    def __init__(self, missing: int) -> None:
        super().__init__(0)
        self.sharing.can_map = lambda _: False  # type: ignore[method-assign]
        self.missing = missing

    def _answer(self, call: Call) -> Any:
        raw = WHOLE.tobytes()
        meta = SimpleNamespace(shape=WHOLE.shape)
        return SimpleNamespace(meta=meta, buffers=[(raw + raw)[: len(raw) - self.missing]])


@pytest.mark.parametrize("missing", [4, 32, -4])
def test_what_does_not_come_whole_is_no_array(missing: int) -> None:
    assert WHOLE.nbytes == 32
    np.testing.assert_array_equal(Pulling(0).array().fetch(), WHOLE)
    with pytest.raises(ProtocolError, match="bytes came of float32"):
        Pulling(missing).array().fetch()


def test_what_is_released_while_it_is_copied_is_lost() -> None:
    with pytest.raises(Lost, match="it was released"):
        Reading(1, released=True).array().fetch()


def test_a_hold_of_which_no_view_is_made_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    given_back: list[object] = []
    leftovers = SimpleNamespace(add=None)
    connection = SimpleNamespace(
        sharing=Moving(0), give_back=given_back.append, leftovers=leftovers
    )
    slot = Slot(1, 0, 0)
    held = SimpleNamespace(meta=HoldReply(5, kept(slot).tensor, b"", ()))
    operation = RemoteArray(cast(Connection, connection), interrupt, kept(slot), None)._view()
    assert next(operation).op == Op.HOLD
    monkeypatch.setattr("djinn_zmq.client.arrays.weakref.finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        operation.send(held)
    assert given_back == [held]


def test_numpy_is_not_given_a_copy_where_it_asks_for_none() -> None:
    array = Reading(0).array()
    assert np.asarray(array).shape == array.shape
    with pytest.raises(ValueError, match=r"copy=False is what view\(\) does"):
        np.asarray(array, copy=False)
