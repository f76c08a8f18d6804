"""Recordings of the last few prompts, so that a resume need not record again."""

from collections import OrderedDict

import numpy as np
import torch

from djinn_zmq.engine.models.loading import ServedModel
from djinn_zmq.engine.models.stepping import Recording
from djinn_zmq.settings import MIB

LIMIT = 256 * MIB  # of all of them; the last is kept whatever its size


class Recordings:
    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Recording] = OrderedDict()  # the least recently used first
        self._nbytes = 0

    def of(self, model: ServedModel, ids: np.ndarray) -> Recording:
        """What *model* hands its layers for *ids*, int64 (batch, positions)."""
        key = b"\0".join((model.info.name.encode(), repr(ids.shape).encode(), ids.tobytes()))
        recording = self._kept.get(key)
        if recording is not None:
            self._kept.move_to_end(key)
            return recording
        tokens = torch.from_numpy(ids).to(model.device)
        recording = self._kept[key] = model.stepper.record(tokens)
        self._nbytes += recording.nbytes
        while self._nbytes > LIMIT and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.nbytes
        return recording
