"""How many descriptors a server takes."""

import resource
from pathlib import Path

import pytest

from djinn_zmq.server import descriptors
from djinn_zmq.server.descriptors import MANY, allow_many_descriptors


@pytest.mark.parametrize(
    ("hard", "most", "taken"),
    [
        (4096, 1 << 30, (4096, 4096)),
        (4096, 2048, (2048, 2048)),
        (resource.RLIM_INFINITY, 2048, (2048, 2048)),
        (resource.RLIM_INFINITY, 1 << 30, (MANY, MANY)),
    ],
)
def test_as_many_are_taken_as_both_the_process_and_the_system_allow(
    hard: int, most: int, taken: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_limits(_: int, limits: tuple[int, int]) -> None:
        if not all(0 <= limit <= most for limit in limits):  # as the kernel does
            raise ValueError("not allowed to raise maximum limit")
        now.append(limits)

    now: list[tuple[int, int]] = []
    (tmp_path / "nr_open").write_text(f"{most}\n")
    monkeypatch.setattr(descriptors, "NR_OPEN", tmp_path / "nr_open")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    allow_many_descriptors()
    assert now == [taken]
