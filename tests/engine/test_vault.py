"""Keys and values that leave the device and come back, beside copies that take their time."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.caches import Account, Segment
from djinn_zmq.engine.devices import Cpu
from djinn_zmq.engine.vault import Vault
from djinn_zmq.settings import KIB
from tests.engine.keepers import ServerSide, running

LAYERS = 4
EXTENT = 100 * KIB // 4  # of float32: four layers are 400 KiB


class Slow(Cpu):
    """A device whose copies in, beside the layers, are never done."""

    def filled(self) -> Callable[[], bool]:
        return lambda: False


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, Slow(), device_memory=512 * KIB) as keeping,
    ):
        yield keeping.vault


def conversation(value: float) -> list[Segment]:
    parts = [torch.full((1, 1, 1, EXTENT), value) for _ in range(LAYERS)]
    return [Segment(0, 1, {("keys", None): part}, None, Account()) for part in parts]


def here(segments: list[Segment]) -> int:
    return sum(not part.is_meta for one in segments for part in one.parts.values())


def go_on(steps: Iterator[None], done: Callable[[], bool] = lambda: False) -> None:
    """To the end of *steps*, or until *done*; an arena that is made meanwhile takes its time."""
    limit = time.monotonic() + 20
    for _ in steps:
        if done():
            return
        assert time.monotonic() < limit


def test_what_leaves_the_device_does_not_wait_for_what_comes(vault: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    vault.track(1, first)
    vault.track(2, second)
    go_on(vault.shrink())  # no room for both: of the first some leave
    assert here(first) < LAYERS == here(second)
    coming = vault.ready(vault.pin(1, first))
    go_on(coming, lambda: here(second) == here(first))  # as many leave as are on their way
    coming.close()


def test_host_memory_is_nobody_elses_while_a_copy_that_was_given_up_is_written_there(
    vault: Vault,
) -> None:
    segments, done = conversation(1.0) + conversation(2.0), False
    vault.track(1, segments)
    vault.device.stored = lambda: lambda: done  # type: ignore[method-assign]
    leaving = vault.shrink()
    go_on(leaving, lambda: bool(vault.on_host))
    next(leaving)
    leaving.close()  # as of a job that is cancelled
    pool = vault.tiers.pool
    used = pool.used
    assert used and not vault.drop_copies()
    segments.clear()
    vault.tiers.settle()
    assert (vault.on_host, pool.used) == (0, used)
    done = True
    vault.tiers.settle()
    assert not pool.used
