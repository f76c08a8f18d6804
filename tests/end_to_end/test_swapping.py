"""Conversations whose keys and values are more than the device may hold: all go on, bit for bit."""

import numpy as np
import pytest

from tests.end_to_end.conftest import free_port, running

SESSIONS, TOKENS = 12, 200


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "s"
    options = ("--gpu-memory=2", "--host-memory=64", "--dtype=float32")  # a CPU's fastest
    with running(folder, "--model=tiny", *options, port=free_port()) as one:
        yield one


def prompt(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 200, TOKENS)


@pytest.fixture
def talks(tiny):
    sessions = [tiny.session() for _ in range(SESSIONS)]
    yield sessions
    for session in sessions:
        session.close()


def test_stopped_conversations_give_way_and_go_on_with_the_same_bits(server, tiny, talks):
    held = [session.run(prompt(n)) for n, session in enumerate(talks)]
    wanted = []
    for n in range(SESSIONS):
        with tiny.session() as alone:
            alone.run(prompt(n))
            wanted.append(alone.run([7, 8, 9]).logits.tobytes())
    for n in reversed(range(SESSIONS)):
        assert talks[n].run([7, 8, 9]).logits.tobytes() == wanted[n], n
    events = [one for one in server.events().so_far() if "keys and values" in one.text]
    out = sum(one.nbytes for one in events if one.kind == "evict")
    back = sum(one.nbytes for one in events if one.kind == "prefetch")
    assert out > 1 << 19 and back > 1 << 18
    del held


def test_a_conversation_stopped_in_a_layer_gives_way_and_goes_on(server, tiny, talks):
    stopped = [session.run(prompt(n), stop_at=3) for n, session in enumerate(talks)]
    for n in (0, 5, SESSIONS - 1):
        wanted = tiny.run(prompt(n)).logits.tobytes()
        assert stopped[n].checkpoint.resume().logits.tobytes() == wanted


def test_a_branch_is_gone_on_from_by_two_at_once_while_others_push(tiny, talks):
    first, other = talks[0], talks[1]
    first.run(prompt(1))
    said = [first.run([5]).logits.tobytes()]
    for n, session in enumerate(talks[2:]):
        session.run(prompt(n))
    other.run(prompt(1))
    assert other.run([5]).logits.tobytes() == said[0]


def test_what_is_closed_gives_its_host_memory_back(server, tiny):
    def host() -> int:
        return server.status().memory.used

    sessions = [tiny.session() for _ in range(SESSIONS)]
    for n, session in enumerate(sessions):
        session.run(prompt(n))
    for session in sessions:
        session.close()
    with tiny.session() as one:
        one.run(prompt(3))
        assert one.run([7]).ids.tolist()
    assert host() == 0


def test_hints_bring_keys_and_values_back_before_they_are_asked_for(server, tiny, talks):
    for n, session in enumerate(talks):
        session.run(prompt(n))
    last = max(event.number for event in server.events().so_far())
    talks[0].back_soon()
    wanted = f"keys and values of session {talks[0].id:016x} are now on the device"
    while not any(event.text == wanted for event in server.events(last).so_far()):
        tiny.ping()
    spans = dict(talks[0].run([7]).spans)
    assert "prefetch" not in spans
