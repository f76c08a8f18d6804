"""Device slots, in plain memory."""

import pytest

torch = pytest.importorskip("torch")

from djinn_zmq.engine.device.slabs import COPIES, Slabs
from djinn_zmq.errors import StaleSlot
from djinn_zmq.settings import MIB


def allocate(nbytes: int):
    return torch.zeros(nbytes, dtype=torch.uint8)


def test_slots_are_apart_and_come_back() -> None:
    slabs = Slabs(4 * MIB, allocate)
    slots = [slabs.lease(MIB // 2) for _ in range(6)]
    for number, slot in enumerate(slots):
        slot.data.fill_(number)
    assert [int(slot.data.float().mean()) for slot in slots] == [0, 1, 2, 3, 4, 5]
    assert slabs.lease(1) is None and slabs.free == 0
    slabs.give_back(slots[1].where)
    again = slabs.lease(MIB // 2)
    assert (again.where.slab, again.where.index) == (slots[1].where.slab, slots[1].where.index)
    assert again.where.generation > slots[1].where.generation
    with pytest.raises(StaleSlot):
        slabs.give_back(slots[1].where)


def test_checkpoints_leave_a_slab_for_what_clients_write_into() -> None:
    slabs = Slabs(4 * MIB, allocate)
    while slabs.lease(MIB, "me"):
        pass
    copy = slabs.lease(MIB, "me" + COPIES)
    assert copy is not None and slabs.lease(1, "me") is None


def test_a_slab_holds_one_zone_at_a_time_and_for_good_once_a_client_has_opened_it() -> None:
    slabs = Slabs(3 * MIB, allocate)
    mine, theirs = slabs.lease(MIB // 2, "me"), slabs.lease(MIB // 2, "")
    assert mine.where.slab != theirs.where.slab
    assert slabs.lease(MIB, "me") is None
    slabs.give_back(theirs.where)
    taken = slabs.lease(MIB, "me")
    assert taken.where.slab == theirs.where.slab
    slabs.slabs[taken.where.slab].exported = True
    slabs.give_back(taken.where)
    assert slabs.lease(MIB // 2, "") is None


def test_no_more_is_asked_of_a_device_that_has_no_more() -> None:
    asked = []

    def refuse(nbytes: int):
        asked.append(nbytes)

    slabs = Slabs(1 << 40, refuse)
    assert slabs.lease(1) is None and slabs.lease(1) is None
    assert len(asked) == 1 and slabs.limit == 0
    assert "--gpu-memory" in str(slabs.full(1))


def test_a_slots_address_is_that_of_its_bytes_and_what_is_used_is_counted() -> None:
    slabs = Slabs(4 * MIB, allocate)
    assert slabs.used == slabs.free == 0
    one, two = slabs.lease(MIB // 2), slabs.lease(MIB // 4)
    assert one is not None and two is not None
    for slot in (one, two):
        assert slot.address == slot.data.data_ptr() and slot.data.numel() == slot.nbytes
    assert (slabs.used, slabs.free) == (3 * MIB // 4, MIB // 4)
    slabs.give_back(one.where)
    assert (slabs.used, slabs.free) == (MIB // 4, 3 * MIB // 4)
    text = str(slabs.full(5 * MIB))
    assert "5.0 MiB of device memory asked, 3.0 MiB free in one piece, 3.8 MiB free in all" in text


def test_a_slab_for_copies_is_left_free_once_and_not_of_what_is_too_small_for_two() -> None:
    slabs = Slabs(4 * MIB, allocate)
    assert slabs.lease(MIB, "me" + COPIES) is not None
    assert [slabs.lease(MIB, "me") is not None for _ in range(4)] == [True, True, True, False]
    assert len({number for number in slabs.slabs if number > 0}) == 4
    assert Slabs(MIB, allocate).lease(MIB, "me") is not None
