import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.serving import Served


@pytest.fixture
def served() -> Iterator[Served]:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(prefix="djs") as folder:
        served = Served(Path(folder))
        yield served
        served.close()
        assert os.listdir(folder) == []
    assert len(os.listdir("/proc/self/fd")) <= before
