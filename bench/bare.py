"""What a resume's round trip is held against: echoes that carry as little. `python -m bench.bare`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.cases import INDEPENDENT, Found, Timed
from bench.config import only
from bench.roundtrips import noop_frame, zmq_call
from djinn_zmq.probe import echoes

NAME = "bare"
IPC, DOORBELL = "ZMQ ipc round trip", "doorbell"


@contextmanager
def cases(folder: Path) -> Iterator[tuple[Found, list[int]]]:
    """One round trip each; and the pids of the echoes. folder: where the ipc socket goes."""
    with ExitStack() as stack:
        bound, router = stack.enter_context(echoes.running("router", f"ipc://{folder}/bare"))
        over_ipc = stack.enter_context(zmq_call(bound, noop_frame(1)))
        ring, bell = stack.enter_context(echoes.ringing())
        yield (
            [Timed(NAME, IPC, INDEPENDENT, over_ipc), Timed(NAME, DOORBELL, INDEPENDENT, ring)],
            [router, bell],
        )


if __name__ == "__main__":
    only(NAME)
