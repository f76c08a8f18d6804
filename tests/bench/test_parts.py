"""Parts run in processes of their own, each within its time."""

import signal

from bench import parts
from bench.parts import Part
from djinn_zmq.probe import schema


def test_a_part_whose_time_is_over_writes_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LEAST_S", 0.1)
    path = tmp_path / "out.json"
    # Half a minute, most of it asleep; a round of it, the least that it has, takes less than one second.
    options = ("--samples=700", "--warmup=0", "--idle-ms=10", "--no-pin", f"--json={path}")
    asked = Part("echo", "tools.zmq_echo", options, 60)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        for limit_s in (3, 8, 25):  # a busy machine may need more for the imports alone
            check = parts.run(asked, limit_s, tmp_path / "log")
            if path.exists():
                break
    finally:
        signal.signal(signal.SIGINT, before)
    assert check.held is False and f"its {limit_s} s were over" in check.found
    found = schema.read(path)
    assert found.samples[0].n >= 1
    assert found.not_measured[-1].why == "the measurement was interrupted"


def test_a_part_is_not_begun_without_time_and_a_failed_one_says_its_last_line(tmp_path):
    late = parts.run(Part("late", "tools.tcp", (), 60), 1.0, tmp_path / "log")
    assert late.held is None and "no time" in late.found
    broken = parts.run(Part("broken", "tools.tcp", ("--bad",), 60), 30, tmp_path / "log")
    assert broken.held is False and "No such option" in broken.found
