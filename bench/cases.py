"""What a baseline hands to the orchestrator: cases to be timed, and those that cannot be had."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from djinn_zmq.probe.results import NotMeasured
from djinn_zmq.probe.rounds import Case, Clock, Task, host_clock

INDEPENDENT = None  # the layer of a case in which no layer occurs

# The manual offload's variants, by which the table finds them: it is made without torch.
PREALLOCATED, PER_CALL = "preallocated", "allocated in each call"
THEN = "then layers N+1..L and head"
HIDDEN, WITH_KV = "hidden state", "hidden state and KV"
# Group of the cases that run a whole forward: a turn of five, 62 ms each, is as long as a GPU takes to slow
# down by 2 % under load, and whoever has his turn then looks slower (seen on an H200).
WHOLE = "whole forward"


@dataclass(frozen=True, slots=True)
class Timed:
    """One case. baseline, variant: what it is. layer: executed before; None: it has none.

    before: untimed, in front of each call. clock: "host" or "device" in the results. group: those of
    one name take turns call by call.
    """

    baseline: str
    variant: str
    layer: int | None
    call: Case
    before: Case | None = None
    clock: Clock = host_clock
    clock_name: str = "host"
    group: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        at = "" if self.layer is None else f", layer {self.layer}"
        on = "" if self.clock_name == "host" else f" ({self.clock_name} time)"
        return f"{self.baseline}: {self.variant}{at}{on}"

    @property
    def task(self) -> Task:
        return Task(self.call, self.before, self.clock, self.group)

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "variant": self.variant,
            "layer": self.layer,
            "clock": self.clock_name,
            **self.more,
        }


Found = list[Timed | NotMeasured]


def working(
    found: Found, stops: tuple[type[Exception], ...]
) -> tuple[list[Timed], list[NotMeasured]]:
    """Call every case once; what raises is not measured, with the reason. *stops* end it all."""
    cases, missing = [], []
    for one in found:
        if isinstance(one, NotMeasured):
            missing.append(one)
            continue
        try:
            if one.before is not None:
                one.before()
            one.call()
        except stops:
            raise
        except Exception as exc:  # noqa: BLE001  another library's own code may raise anything
            why = " ".join(str(exc).split()) or type(exc).__name__
            missing.append(NotMeasured(one.name, why[:300]))
        else:
            cases.append(one)
    return cases, missing


def both_clocks(make: Callable[..., Timed], cuda: bool) -> Found:
    """A case by the host's clock, and on a GPU by the device's own as well."""
    if not cuda:
        return [make()]
    from djinn_zmq.probe.device_time import device_clock

    return [make(), make(clock=device_clock, clock_name="device")]
