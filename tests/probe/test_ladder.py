import numpy as np
import pytest

from djinn_zmq.probe.ladder import (
    ANSWER,
    BELL,
    BETWEEN,
    CODEC,
    ENGINE,
    LANE,
    LATE,
    PONG,
    RAW,
    RESUME,
    SERVER,
    ZMQ,
    decompose,
)
from djinn_zmq.probe.samples import Samples
from djinn_zmq.spans import Spans

US = 1e-6
SPANS = Spans(
    [("encode", 10_000), ("wire", 250_000), ("queue", 20_000), ("decode", 5_000)]
    + [("restore", 30_000), ("compute", 600_000), ("encode", 15_000), ("decode", 10_000)]
)

OWN_S = {BETWEEN: [7 * US] * 9, RESUME: [27 * US] * 9}
INSIDE_S = [8 * US] * 9


def rungs(resume_us: float, **more: float) -> dict[str, Samples]:
    medians = {RAW: 40, ZMQ: 100, CODEC: 120, SERVER: 150, ENGINE: 300, **more, BETWEEN: 310}
    medians |= {ANSWER: 14, PONG: 2, LATE: 23, BELL: 20, RESUME: resume_us}
    return {name: Samples.of(name, np.full(9, us * US)) for name, us in medians.items()}


def test_steps_are_what_a_rung_adds_and_what_the_spans_tell():
    found = decompose(rungs(1007), [SPANS] * 9, OWN_S, INSIDE_S, nbytes=54)
    steps = {step.name: step.seconds / US for step in found.steps}
    assert steps == pytest.approx(
        {RAW: 40, ZMQ: 60, CODEC: 20, SERVER: 30, ENGINE: 150, BETWEEN: 10}
        | {"client": 20, "queue": 20, "messages": 20, "restore": 30, "compute": 600}
        | {"taken in": -8, "answer": 12, "wake-up": 3}
    )
    assert found.rest_s == pytest.approx(0, abs=1e-12) and found.adds_up


@pytest.mark.parametrize(("whole", "adds_up"), [(1100, True), (1130, False), (900, False)])
def test_more_than_a_tenth_missing_or_counted_twice_does_not_add_up(whole, adds_up):
    found = decompose(rungs(whole), [SPANS] * 9, OWN_S, INSIDE_S)
    assert found.adds_up is adds_up
    assert ("DO NOT" in str(found)) is not adds_up


def test_a_lane_is_a_step_down():
    found = decompose(rungs(700, **{LANE: 30}), [SPANS] * 9, OWN_S, INSIDE_S)
    steps = {step.name: step.seconds / US for step in found.steps}
    assert steps[LANE] == pytest.approx(-270) and "-270" in str(found)


def test_what_this_process_spends_in_a_no_op_too_counts_once():
    """Bringing the bytes, say."""
    carried = {BETWEEN: [107 * US] * 9, RESUME: [127 * US] * 9}
    steps = [decompose(rungs(1007), [SPANS] * 9, own, INSIDE_S).steps for own in (OWN_S, carried)]
    assert [one.seconds for one in steps[0]] == pytest.approx([one.seconds for one in steps[1]])


def test_without_the_bare_rungs_the_rest_still_stands():
    taken = {name: one for name, one in rungs(1007).items() if name not in (RAW, ZMQ, CODEC)}
    found = decompose(taken, [SPANS] * 9, OWN_S, INSIDE_S)
    assert [step.name for step in found.steps][:2] == [SERVER, ENGINE]
    rows = found.rows()
    assert rows[-1]["step"] == "whole" and all(row["n"] == 9 for row in rows)
