import ml_dtypes
import numpy as np
import pytest

from djinn_zmq.errors import ProtocolError
from djinn_zmq.wire.tensors import (
    DTYPES,
    Device,
    Frame,
    Inline,
    Slot,
    Tensor,
    check,
    dtype_name,
    inline,
    over,
    view,
)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3, 4), (1,) * 8])
def test_an_array_comes_back_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    array = np.arange(count).astype(DTYPES[name]).reshape(shape)
    tensor = inline(array)
    check(tensor, ())
    back = view(tensor, ())
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (name, shape, array.nbytes)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())

    framed = Tensor(name, shape, Frame(1))
    buffers = [b"other", memoryview(array.tobytes())]
    check(framed, buffers)
    assert view(framed, buffers).tobytes() == array.tobytes()


def test_a_bfloat16_travels_as_the_bytes_it_is() -> None:
    tensor = inline(np.array([1.0, -2.0], ml_dtypes.bfloat16))
    assert tensor == Tensor("bfloat16", (2,), Inline(bytes.fromhex("803f00c0")))


def test_a_view_of_received_bytes_cannot_be_written() -> None:
    assert not view(inline(np.zeros(3, np.int32)), ()).flags.writeable


def test_over_is_as_writable_as_its_memory_and_copies_nothing() -> None:
    memory = bytearray(8)
    over(memoryview(memory), "int32", (2,))[1] = 1
    assert memory == bytes([0, 0, 0, 0, 1, 0, 0, 0])
    assert not over(bytes(8), "int32", (2,)).flags.writeable


@pytest.mark.parametrize("where", [Slot(1, 2, 3), Device(1, 2, 3)])
def test_a_tensor_that_is_elsewhere_has_no_view(where: Slot | Device) -> None:
    tensor = Tensor("uint8", (5,), where)
    check(tensor, ())
    with pytest.raises(ProtocolError, match="not in the message"):
        view(tensor, ())


def test_dtypes_have_a_name_only_in_native_byte_order() -> None:
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())
    assert dtype_name(np.dtype(">f4")) is None
    assert dtype_name(np.dtype("complex64")) is None
    assert dtype_name(np.dtype(object)) is None
