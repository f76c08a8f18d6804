"""How the tensors of an answer travel."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.jobs.loans import FRAME_LIMIT
from djinn_zmq.engine.jobs.replies import Buffers, place, place_torch
from djinn_zmq.errors import RunError
from djinn_zmq.wire.tensors import INLINE_LIMIT, Frame, Inline


@pytest.mark.parametrize("on_torch", [False, True])
def test_a_tensor_travels_inside_the_answer_or_beside_it_and_not_at_all_where_no_frame_carries_it(
    on_torch: bool,
) -> None:
    def placed(nbytes: int, buffers: Buffers) -> object:
        data = np.zeros(nbytes, np.uint8)
        return (
            place_torch(torch.from_numpy(data), buffers) if on_torch else place(data, buffers)
        ).where

    buffers: Buffers = []
    assert placed(INLINE_LIMIT, buffers) == Inline(bytes(INLINE_LIMIT)) and not buffers
    assert placed(INLINE_LIMIT + 1, buffers) == Frame(0)
    assert placed(FRAME_LIMIT, buffers) == Frame(1)
    with pytest.raises(RunError, match=r"a tensor of 1\.0 MiB: at most 1\.0 MiB fit a frame"):
        placed(FRAME_LIMIT + 1, buffers)
    assert len(buffers) == 2
