"""A GPU's own clock: how long the device worked, without what the host spent on launching.

`torch.cuda.Event` counts on the device in steps of about half a microsecond. Imported only where there
is a GPU to be measured: this is the one file of the probe that imports torch.
"""

from collections.abc import Callable

import torch

from djinn_zmq.probe.rounds import Case


def device_clock(case: Case) -> float:
    """Seconds between two events around *case* on the current stream, all its work done.

    The device idles before the first event, so a case that is bound by its launches shows them.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    case()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def waits(device: torch.device) -> Callable[[], None]:
    """What has to be called before a host clock is read: nothing on a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
