"""Keys and values that leave the device and come back, beside copies that take their time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.multiprocessing.reductions import StorageWeakRef

from djinn_zmq.engine.device.devices import Cpu
from djinn_zmq.engine.device.slabs import COPIES
from djinn_zmq.engine.models.caches import Account, Segment
from djinn_zmq.engine.state.vault import Vault
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
    assert not vault.drop_copies()
    leaving.close()  # as of a job that is cancelled
    pool = vault.room.pool
    used = pool.used
    assert used and not vault.drop_copies()
    segments.clear()
    vault.settle()
    vault.room.settle()
    assert (vault.on_host, pool.used) == (0, used)
    done = True
    vault.room.settle()
    assert not pool.used


def test_what_ends_in_the_middle_of_something_is_freed_where_nothing_is_in_the_middle(
    vault: Vault,
) -> None:
    segments, pool = conversation(1.0) + conversation(2.0), vault.room.pool
    vault.track(1, segments)
    go_on(vault.shrink())
    before = (vault.on_device, vault.on_host, pool.used)
    ending = threading.Thread(target=segments.clear)  # as garbage collection may, in any of them
    ending.start()
    ending.join()
    assert (vault.on_device, vault.on_host, pool.used) == before and all(before)
    vault.settle()
    assert (vault.on_device, vault.on_host, pool.used) == (0, 0, 0)


def test_who_wants_host_memory_gets_first_what_has_ended(vault: Vault) -> None:
    segments, pool = conversation(1.0) + conversation(2.0), vault.room.pool
    vault.track(1, segments)
    go_on(vault.shrink())
    segments.clear()
    assert pool.used and vault.drop_copies()
    assert not pool.used and not vault.drop_copies()


class Told(Cpu):
    """A device whose copies in are done when it is told so, and whose copies fail where that is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.done = True
        self.fails = ""  # "in", "out"
        self.targets: list[StorageWeakRef] = []

    def fill_beside(self, data: np.ndarray, target: torch.Tensor) -> None:
        if self.fails == "in":
            raise RuntimeError("out of memory")
        self.targets.append(StorageWeakRef(target.untyped_storage()))
        super().fill_beside(data, target)

    def filled(self) -> Callable[[], bool]:
        return lambda: self.done

    def store(self, data: torch.Tensor, slot: memoryview) -> None:
        if self.fails == "out":
            raise RuntimeError("a mistake")
        super().store(data, slot)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def obeying(tmp_path: Path, told: Told) -> Iterator[Vault]:
    with (
        closing(ServerSide(tmp_path)) as server,
        running(server, told, device_memory=512 * KIB) as keeping,
    ):
        yield keeping.vault


def test_what_a_copy_that_was_given_up_has_written_to_is_let_go_of_when_it_is_done(
    obeying: Vault, told: Told
) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    go_on(obeying.shrink())
    pins = obeying.pin(1, first)
    told.done, coming = False, obeying.ready(pins)
    go_on(coming, lambda: bool(told.targets))
    coming.close()  # as of a job that is cancelled
    obeying.unpin(pins)
    assert obeying.pressed  # so that a chore of shrinking it is begun
    letting_go = obeying.shrink()
    go_on(letting_go, lambda: not obeying.crowded)
    next(letting_go)
    assert not any(one.expired() for one in told.targets)  # it may be written to still
    told.done = True
    go_on(letting_go)
    assert all(one.expired() for one in told.targets) and not obeying.pressed


def test_an_error_on_the_way_in_ends_the_way_out_with_it(obeying: Vault, told: Told) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    go_on(obeying.shrink())
    told.fails, told.stored = "in", lambda: lambda: False  # type: ignore[method-assign]
    pins = obeying.pin(1, first)
    with pytest.raises(RuntimeError, match="out of memory") as failed:
        go_on(obeying.ready(pins))
    assert not obeying.shrinking  # others may
    del failed  # which has the frames of both
    obeying.unpin(pins)
    assert (obeying._coming, obeying.on_host > 0) == (0, True)
    del told.stored
    go_on(obeying.shrink())  # what was written to until then is let go of
    assert not obeying.pressed


def test_what_could_not_be_copied_out_whole_has_no_copy(obeying: Vault, told: Told) -> None:
    segments = conversation(1.0) + conversation(2.0)
    obeying.track(1, segments)
    told.fails = "out"
    with pytest.raises(RuntimeError, match="a mistake"):
        go_on(obeying.shrink())
    obeying.room.settle()
    assert (here(segments), obeying.on_host, obeying.room.pool.used) == (len(segments), 0, 0)
    told.fails = ""
    go_on(obeying.shrink())
    gone = [one for one in segments if not here([one])]
    assert gone
    go_on(obeying.ready(obeying.pin(1, gone)))
    assert all(bool((part == 1.0).all()) for one in gone[:LAYERS] for part in one.parts.values())


def test_a_hint_brings_no_more_than_may_be_on_the_device(obeying: Vault) -> None:
    earlier, later = conversation(1.0), conversation(2.0)
    obeying.track(1, earlier)
    obeying.track(1, later)
    go_on(obeying.shrink())
    others = conversation(3.0)
    go_on(obeying.ready(obeying.pin(2, others)))
    assert here(earlier + later) < 2 * LAYERS
    others.clear()
    go_on(obeying.back(1))
    assert here(later) == LAYERS  # of the most recently used first
    assert not obeying.crowded
    obeying.limit = 0  # nor does it keep them there
    go_on(obeying.shrink())
    assert here(later) == 0


def values(segments: list[Segment]) -> set[float]:
    return {
        float(one) for part in segments for data in part.parts.values() for one in data.unique()
    }


def test_what_a_job_goes_on_from_stays(obeying: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    pins = obeying.pin(1, first)
    obeying.track(2, second)  # used later
    go_on(obeying.shrink())
    assert here(first) == LAYERS > here(second)
    obeying.unpin(pins)
    go_on(obeying.ready(obeying.pin(2, second)))
    assert here(first) < LAYERS == here(second)


def test_what_a_job_goes_on_from_while_it_leaves_stays(obeying: Vault, told: Told) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    out = False
    told.stored = lambda: lambda: out  # type: ignore[method-assign]
    leaving = obeying.shrink()
    go_on(leaving, lambda: bool(obeying.on_host))
    obeying.pin(1, first)
    out = True
    go_on(leaving)  # others' in its stead
    assert here(first) == LAYERS > here(second)


def test_what_was_used_last_leaves_last(obeying: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    obeying.track(1, first)  # used again
    go_on(obeying.shrink())
    assert here(first) == LAYERS > here(second)
    go_on(obeying.ready(obeying.pin(2, second)))
    assert here(first) < LAYERS == here(second)


def test_what_is_away_leaves_before_what_was_not_used_for_longer(obeying: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    obeying.room.away(2, 60.0)
    go_on(obeying.shrink())
    assert here(first) == LAYERS > here(second)


def test_two_that_go_on_from_one_past_bring_it_once(obeying: Vault, told: Told) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    go_on(obeying.shrink())
    gone, told.done = LAYERS - here(first), False
    one, other = obeying.bring(obeying.pin(1, first)), obeying.bring(obeying.pin(1, first))
    next(one)
    next(other)
    told.done = True
    go_on(other, lambda: next(one, "done") == "done")
    go_on(other)
    assert len(told.targets) == gone and values(first) == {1.0}
    assert obeying.on_device == sum(each.nbytes for each in first + second[: here(second)])


def test_the_only_copy_is_not_given_up_and_a_spare_one_is(obeying: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    go_on(obeying.shrink())
    assert obeying.on_host and not obeying.drop_copies()
    obeying.limit = 1 << 30
    go_on(obeying.ready(obeying.pin(1, first)))
    while obeying.drop_copies():
        pass
    assert (obeying.on_host, obeying.room.pool.used) == (0, 0)
    assert values(first) == {1.0} and here(first) == LAYERS


def test_two_ways_out_at_once_move_no_more_than_has_to_leave(obeying: Vault, told: Told) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    out = False
    told.stored = lambda: lambda: out  # type: ignore[method-assign]
    one, other = obeying.shrink(), obeying.shrink()
    go_on(one, lambda: bool(obeying.on_host))
    next(other)
    out = True
    go_on(one)
    gone = 2 * LAYERS - here(first + second)
    go_on(other)
    assert gone == 2 * LAYERS - here(first + second) and not obeying.crowded


def test_each_part_of_a_segment_comes_back_with_its_own_bits_and_strides(obeying: Vault) -> None:
    """Of several, of other dtypes, of sizes that fill no whole number of lines."""
    keys = torch.randn(1, 5, 3, 7).transpose(1, 2)
    values = torch.randn(1, 3, 5, 7).bfloat16()
    positions = torch.arange(5)
    parts = {("keys", None): keys, ("values", None): values, ("positions", 0): positions}
    before = {name: (part.clone(), part.stride()) for name, part in parts.items()}
    segment = Segment(0, 5, parts, None, Account())
    gaps = Segment(0, 5, {("keys", None): torch.randn(5, 8)[:, :7]}, None, Account())
    obeying.track(1, [segment, gaps])
    obeying.limit = 0
    go_on(obeying.shrink())
    assert here([segment]) == 0 and obeying.on_device == 0
    assert here([gaps]) == 1  # it cannot be moved as it is
    obeying.limit = 1 << 20
    go_on(obeying.ready(obeying.pin(1, [segment])))
    assert here([segment]) == 3 and obeying.on_device == segment.nbytes
    for name, (data, stride) in before.items():
        part = segment.parts[name]
        assert (part.dtype, part.stride()) == (data.dtype, stride) and torch.equal(part, data)


def test_what_has_left_leaves_once_and_is_told_of_by_session(obeying: Vault) -> None:
    first, second = conversation(1.0), conversation(2.0)
    obeying.track(1, first)
    obeying.track(2, second)
    go_on(obeying.shrink())
    assert 0 < here(first) < LAYERS
    obeying.limit = 0
    go_on(obeying.shrink())
    assert here(first + second) == obeying.on_device == 0
    nbytes = sum(one.nbytes for one in first)
    for session in (1, 2):
        mine = [one for one in obeying.moves if one.session == session]
        assert {one.how for one in mine} == {"evict"}
        assert sum(one.nbytes for one in mine) == nbytes


def test_keys_and_values_have_what_slabs_leave_of_the_device_and_a_quarter_in_any_case(
    obeying: Vault,
) -> None:
    slabs, limit = obeying.room.slabs, 512 * KIB
    slabs._slab_nbytes = 128 * KIB
    assert obeying.allowance == limit
    slabs.lease(1)
    assert obeying.allowance == limit - 128 * KIB
    slabs._slab_nbytes = 300 * KIB
    slabs.lease(1, COPIES)
    assert obeying.allowance == limit // 4 > limit - slabs.mapped


def test_what_is_just_allowed_is_not_too_much(obeying: Vault) -> None:
    segments = conversation(1.0)
    obeying.track(1, segments)
    obeying.limit = obeying.on_device
    assert not obeying.crowded and not obeying.pressed
    obeying.limit -= 1
    assert obeying.crowded and obeying.pressed
    obeying.shrinking = True  # somebody sees to it
    assert obeying.crowded and not obeying.pressed
    obeying.shrinking = False
    obeying.limit = None
    assert not obeying.crowded
