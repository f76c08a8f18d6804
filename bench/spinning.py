"""Ends that stay awake after a message: what `--spin-us` saves a no-op, and the cores it keeps busy for it.

It is off by default, and the budgets are held without. Where a server is asked again within its spin,
nobody has to be woken; but server and engine each keep a core busy that long after every message, and a
client on a lane while it waits for the answer. So each idle gap has a server that spins just over it:
a longer spin saves no more, a shorter one nothing. Over tcp it is the server and the engine that spin.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import djinn_zmq as djinn
from bench.roundtrips import DJINN, LANE, Call
from djinn_zmq.probe.cpu_time import cpu_ns
from djinn_zmq.probe.samples import Ratio, Samples, ratio
from djinn_zmq.probe.serving import MODEL, begun, sockets_folder

TCP = DJINN.format("tcp")
# By milliseconds of idling, 0: back to back: microseconds that just reach over it.
OVER_US = {0: 200, 2: 3_000, 50: 60_000}


@dataclass(frozen=True, slots=True)
class Spinning:
    """A server whose ends spin. calls: by the name of the same case without. pids: the server's and its
    engine's."""

    spin_us: int
    calls: dict[str, Call]
    pids: tuple[int, ...]

    def named(self, case: str) -> str:
        return f"{case}, --spin-us {self.spin_us}"


@contextmanager
def servers(spins_us: Sequence[int]) -> Iterator[list[Spinning]]:
    """One for each, with a client on its lane that spins as well, and one over tcp."""
    found = []
    with ExitStack() as stack:
        begin = {
            spin_us: stack.enter_context(
                begun(stack.enter_context(sockets_folder()), f"--spin-us={spin_us}")
            )
            for spin_us in sorted(set(spins_us))
        }
        for spin_us, ready in begin.items():
            served = ready()
            near = stack.enter_context(djinn.connect(served.ipc, progress=None, spin_us=spin_us))
            far = stack.enter_context(djinn.connect(served.tcp, progress=None, lane=False))
            calls = {LANE: near.model(MODEL).ping, TCP: far.model(MODEL).ping}
            found.append(Spinning(spin_us, calls, served.pids))
        yield found


def over(gap_s: float, spinning: Sequence[Spinning]) -> Spinning | None:
    """The shortest that stays awake over the gap, or else the longest; None where none spins."""
    long_enough = [one for one in spinning if one.spin_us / 1e6 > gap_s]
    return (long_enough or list(spinning[-1:]) or [None])[0]


@dataclass(slots=True)
class Busy:
    """How many cores a case's own server and engine keep busy, turn by turn.

    pids: of each case that is looked at. Called with a case's name when its turn has ended, as
    `interleaved` does; what lies before the first turn's end are the cases' first calls, and not counted.
    """

    pids: Mapping[str, tuple[int, ...]]
    _last: dict[tuple[int, ...], int] = field(default_factory=dict)
    _last_s: float = 0.0
    _turns: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def __call__(self, case: str) -> None:
        now_s, now = time.perf_counter(), {pids: cpu_ns(pids) for pids in set(self.pids.values())}
        if self._last and case in self.pids:
            mine = self.pids[case]
            turn = (now[mine] - self._last[mine]) / 1e9, now_s - self._last_s
            self._turns.setdefault(case, []).append(turn)
        self._last, self._last_s = now, now_s

    def ratio_of(self, case: str, name: str) -> Ratio:
        """Seconds of CPU over seconds, n turns."""
        cpu, elapsed = zip(*self._turns[case], strict=True)
        return ratio(Samples.of("CPU time", cpu), Samples.of("time", elapsed), name=name)
