"""Holding checkpoints for clients' views, beside a device that takes its time."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from djinn_zmq.engine.jobs import EngineSession
from djinn_zmq.engine.keeping import Keeping
from djinn_zmq.engine.moving import Mover
from djinn_zmq.engine.runs import Runner
from djinn_zmq.settings import MIB
from djinn_zmq.spans import Stopwatch
from djinn_zmq.wire.tiers import Hold
from tests.engine.keepers import IDS, OWNER, Late, ServerSide, running


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[Keeping]:
    device = Late()
    device.export = lambda slab: ("00", b"handle")
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, device, device_memory=4 * MIB) as keeping,
    ):
        yield keeping
        device.copies.clear()


@pytest.mark.parametrize("copy", [False, True])
def test_a_hold_that_is_given_up_before_it_was_told_of_ends(keeping: Keeping, copy: bool) -> None:
    device: Any = keeping.device
    data = torch.randn(2, 5, 8)
    kept = keeping.keep(data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
    device.finish()
    keeping.tiers.fill()
    slabs, used = keeping.tiers.slabs.slabs, keeping.pool.used
    session, model = EngineSession(1, OWNER, "tiny", asker=os.getpid()), object()
    _, turns = Mover(keeping, Runner(keeping)).hold(
        Hold(kept.id, "device", copy), (), session, model, Stopwatch(), shared=True
    )
    device.busy = True
    next(turns)
    assert keeping.holds.of(1)
    turns.close()  # as a client does that waits no longer
    assert not keeping.holds.of(1) and keeping.entries[kept.id].body.idle
    device.busy = False
    keeping.tiers.settle()
    assert sum(len(slab.leased) for slab in slabs.values()) == 1 and keeping.pool.used == used


def test_views_of_one_checkpoint_that_end_with_their_client_leave_no_descriptor(
    keeping: Keeping,
) -> None:
    device: Any = keeping.device
    data = torch.randn(2, 5, 8)
    kept = keeping.keep(data, session=1, owner=OWNER, run=7, layer=2, ids=IDS)
    device.finish()
    keeping.tiers.fill()
    before = len(os.listdir("/proc/self/fd"))
    client = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    body = keeping.entries[kept.id].body
    for number in range(101, 106):
        keeping.holds.view(number, 1, body, client.pid)
    for number in range(101, 106):
        keeping.holds.end(number, gone=True)
    client.communicate()
    keeping.tiers.settle()
    assert len(os.listdir("/proc/self/fd")) == before
