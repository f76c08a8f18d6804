"""Which slots a client writes into, with CUDA's calls noted in place of made."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from djinn_zmq.client import cuda
from djinn_zmq.client.cuda import CudaMemory
from djinn_zmq.client.lanes import Lanes
from djinn_zmq.client.leftovers import Leftovers
from djinn_zmq.client.sharing import Sharing
from djinn_zmq.client.tiers import Tiered
from djinn_zmq.errors import RequestError
from djinn_zmq.memory.arena import GRANULE
from djinn_zmq.settings import Settings
from djinn_zmq.wire.ops import Op
from djinn_zmq.wire.tensors import Device, Tensor
from djinn_zmq.wire.tiers import Handle, HoldReply

BASE = 1 << 40  # where the slab is opened
SHAPE = (1, 4, 8)
HANDLE = Handle("00", b"slab", 16 * GRANULE, 0, 1)


def slot(index: int, generation: int = 1) -> Device:
    return Device(3, index, generation)


class Gpu:
    """A client's memory with one writable tensor in slot 0; *written*: the slots copied into; *done*: what
    of CUDA was called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spare: Device | None) -> None:
        self.written: list[int] = []
        self.done: list[str] = []
        runtime = SimpleNamespace(
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda number: {"uuid": b"\0"},
            getDevice=lambda: 0,
            ipcOpenMemHandle=lambda handle: BASE,
            ipcCloseMemHandle=lambda pointer: self.done.append("closed"),
            deviceSynchronize=lambda: self.done.append("waited for the device"),
            streamSynchronize=lambda stream: self.done.append("waited for the copy"),
            memcpyAsync=self.copy,
        )
        cupy = SimpleNamespace(
            cuda=SimpleNamespace(runtime=runtime, Device=lambda number: nullcontext())
        )
        monkeypatch.setattr(cuda, "_imported", lambda: cupy)
        self.memory = CudaMemory()
        self.tensor: Any = SimpleNamespace(
            shape=SHAPE, data_ptr=lambda: BASE, is_contiguous=lambda: True
        )
        self.memory.tensor = self.make  # type: ignore[method-assign]
        where = Tensor("float32", SHAPE, slot(0))
        self.memory.writable(where, HANDLE, spare, lambda: self.done.append("given up"))

    def copy(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        assert source == BASE
        self.written.append((to - BASE) // GRANULE)
        self.done.append("copied")

    def make(self, tensor: Tensor, handle: Handle, end: Callable[[], None]) -> Any:
        self.end = end  # when nothing refers to the tensor any more
        return self.tensor

    def send(self) -> Tensor:
        sent = self.memory.sent(self.tensor, to_keep=True)
        assert sent is not None
        return sent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch, slot(1))


def test_a_spare_is_filled_once_and_without_one_the_tensor_itself_is_named(gpu: Gpu) -> None:
    assert gpu.send().where == slot(1) and gpu.written == [1]
    assert gpu.send().where == slot(0) and gpu.written == [1]


def test_edits_are_complete_before_it_is_named_and_the_copy_of_it_too(gpu: Gpu) -> None:
    assert gpu.memory.sent(gpu.tensor, to_keep=False) is not None
    assert gpu.done == ["waited for the device"]
    gpu.send()
    assert gpu.done[1:] == ["waited for the device", "copied", "waited for the copy"]


def test_a_part_of_it_and_one_that_has_gone_are_not_taken_for_the_tensor(gpu: Gpu) -> None:
    gpu.tensor.shape = (1, 4, 4)  # the first of its channels begin where it does
    assert gpu.memory.sent(gpu.tensor, to_keep=False) is None
    gpu.tensor.shape = SHAPE
    gpu.end()
    assert gpu.done == ["given up"]
    assert gpu.memory.sent(gpu.tensor, to_keep=False) is None  # another is there by now


def test_the_slabs_of_an_engine_that_is_gone_are_closed_when_the_next_ones_are_opened(
    gpu: Gpu,
) -> None:
    gpu.memory._open(HANDLE)
    assert not gpu.done and list(gpu.memory._opened) == [HANDLE.data]
    gpu.memory._open(replace(HANDLE, data=b"another"))  # of the same engine
    assert not gpu.done and len(gpu.memory._opened) == 2
    gpu.memory._open(replace(HANDLE, data=b"next", epoch=HANDLE.epoch + 1))
    assert gpu.done == ["closed", "closed"] and list(gpu.memory._opened) == [b"next"]


def test_a_view_with_its_elements_in_another_order_is_not_taken_for_the_tensor(gpu: Gpu) -> None:
    gpu.tensor.is_contiguous = lambda: False
    assert gpu.memory.sent(gpu.tensor, to_keep=True) is None and not gpu.written
    cupys = SimpleNamespace(
        shape=SHAPE, data=SimpleNamespace(ptr=BASE), flags=SimpleNamespace(c_contiguous=False)
    )
    assert gpu.memory.sent(cupys, to_keep=False) is None
    cupys.flags.c_contiguous = True
    assert gpu.memory.sent(cupys, to_keep=False) is not None


def test_the_spare_that_an_answer_names_is_the_next(gpu: Gpu) -> None:
    gpu.memory.restock(gpu.tensor, gpu.send(), slot(2))
    assert gpu.send().where == slot(2) and gpu.written == [1, 2]


def test_an_answer_that_names_a_spare_given_away_meanwhile_is_not_followed(gpu: Gpu) -> None:
    first, second = gpu.send(), gpu.send()  # with the spare, and as it is: both under way
    gpu.memory.restock(gpu.tensor, first, slot(2))
    third = gpu.send()
    assert third.where == slot(2)
    gpu.memory.restock(gpu.tensor, second, slot(2))  # answered before the engine took the third
    assert gpu.send().where == slot(0) and gpu.written == [1, 2]
    gpu.memory.restock(gpu.tensor, third, slot(3))
    assert gpu.send().where == slot(3)


def test_a_spare_whose_request_was_refused_may_be_offered_again(gpu: Gpu) -> None:
    gpu.memory.restock(gpu.tensor, gpu.send(), None)
    assert gpu.send().where == slot(0)
    gpu.memory.restock(gpu.tensor, gpu.send(), slot(1))
    assert gpu.send().where == slot(1) and gpu.written == [1, 1]


@pytest.mark.parametrize("copy", [False, True])
def test_a_hold_of_which_no_tensor_is_made_is_given_back(copy: bool) -> None:
    def refuses(*_: object) -> None:
        raise RequestError("this process does not see the engine's GPU")

    given_back: list[tuple[int, int]] = []
    memory = SimpleNamespace(tensor=refuses, writable=refuses)
    point: Any = Tiered()
    point._kept = SimpleNamespace(id=11, session=7)
    point._session = SimpleNamespace(
        connection=SimpleNamespace(
            sharing=SimpleNamespace(cuda=lambda: memory),
            leftovers=SimpleNamespace(add=lambda *one: given_back.append(one)),
        )
    )
    operation = point._cuda(copy=copy)
    assert next(operation).op == Op.HOLD
    with pytest.raises(RequestError, match="does not see"):
        operation.send(
            SimpleNamespace(meta=HoldReply(5, Tensor("float32", SHAPE, slot(0)), HANDLE))
        )
    assert given_back == [(7, 5)]


class Array:
    def __init__(self, shape: Any, dtype: Any, memptr: Any) -> None:
        self.memory = memptr

    def view(self, dtype: Any) -> "Array":
        return self

    def reshape(self, shape: Any) -> "Array":
        return self


def test_a_tensor_that_has_gone_is_given_up_only_behind_the_kernels_that_may_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda number: {"uuid": b"\0"},
        ipcOpenMemHandle=lambda handle: BASE,
        ipcCloseMemHandle=lambda pointer: None,
        deviceSynchronize=lambda: done.append("waited for the device"),
        CUDARuntimeError=RuntimeError,
    )
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            runtime=runtime,
            Device=lambda number: nullcontext(),
            UnownedMemory=lambda *memory: memory,
            MemoryPointer=lambda memory, offset: memory,
        ),
        ndarray=Array,
        uint8=None,
    )
    monkeypatch.setattr(cuda, "_imported", lambda: cupy)
    monkeypatch.setitem(sys.modules, "torch", None)
    sharing = Sharing(Settings())
    sharing._cuda = CudaMemory()
    lanes = Lanes(sharing, Settings(), wanted=False)
    leftovers = Leftovers(sharing, lanes, lambda *_: done.append("given up"))
    made = sharing._cuda.tensor(
        Tensor("float32", SHAPE, slot(0)), HANDLE, lambda: leftovers.add(5, 7)
    )
    leftovers.say()
    assert done == []
    del made
    leftovers.say()
    assert done == ["waited for the device", "given up"]
    leftovers.add(5, 8)  # nothing on a device
    leftovers.say()
    assert done == ["waited for the device", "given up", "given up"]
