"""Slots that nobody refers to any more, while somebody is not through with them: the device, a thread, a client
that wrote into them. Each is free to be leased again when what it waits for says so.
"""

from collections.abc import Callable
from functools import partial

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.device.slabs import DeviceSlot, Slabs

Done = Callable[[], bool]
GiveBack = Callable[[], None]


class Leaving:
    def __init__(self, device: Device, slabs: Slabs) -> None:
        self._device = device
        self._slabs = slabs
        self._waiting: list[tuple[Done, GiveBack]] = []
        # The same of what clients could write into. They end when they like: nobody waits for that.
        self._lent: list[tuple[Done, GiveBack]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._lent)

    @property
    def soon(self) -> bool:
        """Will some of them be free without a client's doing?"""
        return bool(self._waiting)

    def free_when(self, done: Done | None, give_back: GiveBack) -> None:
        """Call *give_back* when *done* says so, which may be now. None: nothing is waited for."""
        if done is None or done():
            give_back()
        else:
            self._waiting.append((done, give_back))

    def free_after(self, slot: DeviceSlot, *conditions: Done | None) -> None:
        """*slot* could be written into by a client: free it when *conditions* hold, that of its end among
        them, and the device is through with all that was begun by then: nothing orders behind that what
        the next client does."""
        computed: Done | None = None

        def done() -> bool:
            nonlocal computed
            if computed is None:
                if not all(condition is None or condition() for condition in conditions):
                    return False
                computed = self._device.computed()
            return computed()

        if done():
            self._slabs.give_back(slot.where)
        else:
            self._lent.append((done, partial(self._slabs.give_back, slot.where)))

    def settle(self) -> None:
        """Free those that are waited for no more."""
        for these in (self._waiting, self._lent):
            for leaving in [one for one in these if one[0]()]:
                these.remove(leaving)
                leaving[1]()

    def clear(self) -> None:
        self._waiting.clear()
        self._lent.clear()
