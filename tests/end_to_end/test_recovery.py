"""An engine whose device is of no use any more ends itself, says why, and loses no copy it can keep."""

import numpy as np
import pytest

from djinn_zmq.errors import Lost
from tests.end_to_end import poison

FRANCE = "the capital of france is"


def test_an_engine_with_a_poisoned_device_ends_itself_with_the_reason(serve, tmp_path, monkeypatch):
    trigger = poison.lay(tmp_path, monkeypatch)
    options = ("--gpu-memory=8", "--host-memory=8", f"--state={tmp_path / 'state'}")
    with serve("--model=tiny", *options) as running, running.connect() as server:
        tiny = server.model("tiny")
        whole = tiny.run(FRANCE).logits.tobytes()
        points = [tiny.run(FRANCE, stop_at=layer).checkpoint for layer in (1, 2, 3)]
        points[1].evict("disk")
        rows = [np.asarray(point.hidden).tobytes() for point in points]
        pid = running.engine_pid()
        trigger.touch()
        with pytest.raises(Lost, match=rf"pid {pid}\) ended itself: the device is poisoned.*kept"):
            tiny.run("the capital of spain is")
        trigger.unlink()
        for point, row in zip(points, rows, strict=True):
            assert point.resume().logits.tobytes() == whole
            assert np.asarray(point.hidden).tobytes() == row
        assert running.engine_pid() != pid
        texts = [event.text for event in server.events().so_far() if event.kind == "engine"]
        assert any("ended itself: the device is poisoned" in text for text in texts)
