"""Copies to host slots, beside the layers: begun, perhaps later than they are told of, and done.

A slot that is being filled says so in its arena's table, so that a checkpoint can be told of before its copy
is done, or begun: nobody reads what is not there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from djinn_zmq.engine.device.devices import Device
from djinn_zmq.engine.state.bodies import Body
from djinn_zmq.memory.arena import Lease, Pool


@dataclass(slots=True, eq=False)
class _Promised:
    """A copy of *body* to its host slot that is still to be begun. Called: is it done?"""

    body: Body
    begun: Callable[[], bool] | None = None

    def __call__(self) -> bool:
        return self.begun is not None and self.begun()


class Storing:
    def __init__(self, device: Device, pool: Pool) -> None:
        self._device = device
        self._pool = pool
        self._filling: list[Body] = []  # whose host slots are told of, and not filled yet
        self._promised: list[_Promised] = []

    def __bool__(self) -> bool:
        return bool(self._filling)

    def begin(self, body: Body, data: torch.Tensor, lease: Lease) -> None:
        """Begin to copy *data* to the slot of *lease*, which is *body*'s from now on."""
        body.host = lease
        if body.nbytes:
            self._device.store(data, lease.view)
        body.busy = body.storing = self._device.stored()
        if not body.stored:
            self._fill(body, lease)

    def promise(self, body: Body, lease: Lease) -> None:
        """The same of its device copy, begun by the next `settle`."""
        body.host = lease
        body.busy = body.storing = promised = _Promised(body)
        self._promised.append(promised)
        self._fill(body, lease)

    def _fill(self, body: Body, lease: Lease) -> None:
        self._pool.arenas[lease.slot.arena].filling(lease.slot)
        self._filling.append(body)

    def settle(self) -> bool:
        """Begin what was promised, and let slots be read that are filled by now. True where some are."""
        while self._promised:
            promised = self._promised.pop()
            slot, lease = promised.body.device, promised.body.host
            assert slot is not None and lease is not None  # they stay until the body is settled
            self._device.store(slot.data, lease.view)
            promised.begun = self._device.stored()
        filled = [one for one in self._filling if one.stored]
        for body in filled:
            self._filling.remove(body)
            if body.host is not None and (arena := self._pool.arenas.get(body.host.slot.arena)):
                arena.filled(body.host.slot)  # else it is no more, and what was in it neither
        return bool(filled)

    def clear(self) -> None:
        self._filling.clear()
        self._promised.clear()
