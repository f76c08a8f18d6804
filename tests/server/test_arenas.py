"""What processes share, and who may map it."""

from djinn_zmq.memory.arena import OwnArena
from djinn_zmq.settings import KIB
from djinn_zmq.wire import messages
from tests.server.serving import Served, told


def test_an_arena_that_an_engine_gives_up_says_so_to_all_who_map_it(served: Served) -> None:
    arena, other = (OwnArena.create(4 * KIB, "test") for _ in range(2))
    numbers = []
    for one in (arena, other):
        served.lease.send(messages.Share(), one.fd)
        numbers.append(told(served, served.lease).arena)
    assert not arena.retired
    served.lease.send(messages.Retire(numbers[0]))
    served.lease.send(messages.Want(numbers[0]))
    assert told(served, served.lease).text == f"arena {numbers[0]} is gone"
    assert arena.retired and not other.retired
    arena.close()
    other.close()
