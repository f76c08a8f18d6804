import time

import pytest

from djinn_zmq.probe.rounds import Plan, Task, each_round, interleaved, told_clock


def test_cases_take_turns_a_b_c_a_b_c():
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    taken = interleaved(cases, Plan(rounds=3, per_round=2, warm_up=1, settle=0))
    assert "".join(calls) == "abc" + 3 * "aabbcc"
    assert all(samples.seconds.shape == (3, 2) for samples in taken.values())
    assert [samples.name for samples in taken.values()] == list("abc")


def test_settling_calls_are_made_and_not_counted():
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    taken = interleaved(cases, Plan(rounds=2, per_round=1, warm_up=0, settle=2))
    assert "".join(calls) == 2 * "aaabbb"
    assert taken["a"].n == 2


def test_the_gap_is_slept_before_each_call_and_not_counted(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    interleaved({"a": lambda: None}, Plan(2, 3, gap_s=0.5, warm_up=4, settle=1))
    assert slept == [0.5] * (2 * (3 + 1))


@pytest.mark.parametrize("samples", [1, 7, 20, 2000, 2001])
def test_a_plan_takes_at_least_the_samples_asked_for(samples):
    plan = Plan.of(samples, 20)
    assert samples <= plan.samples < samples + 20
    assert plan.rounds <= 20


def test_an_error_of_a_case_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 // 0}, Plan(1, 1))


def test_there_and_back_turns_every_second_round_around():
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    plan = Plan(rounds=2, per_round=1, warm_up=0, settle=0, there_and_back=True)
    taken = interleaved(cases, plan, labels={"a": {"layer": 1}})
    assert "".join(calls) == "abccba"
    assert list(taken) == list("abc") and taken["a"].labels == {"layer": 1}


def test_cases_of_a_group_take_turns_call_by_call_where_the_first_of_them_is():
    calls: list[str] = []
    groups = {"a": "", "b": "together", "c": "", "d": "together"}
    cases = {
        name: Task(lambda name=name: calls.append(name), group=group)
        for name, group in groups.items()
    }
    plan = Plan(rounds=2, per_round=2, warm_up=0, settle=1, there_and_back=True)
    taken = interleaved(cases, plan)
    assert "".join(calls) == "aaa" + "bd" + "bdbd" + "ccc" + "db" + "dbdb" + "ccc" + "aaa"
    assert list(taken) == list("abcd") and taken["d"].seconds.shape == (2, 2)


def test_what_comes_before_a_call_is_not_timed_and_a_call_may_bring_its_own_time():
    calls: list[str] = []
    task = Task(lambda: 0.25, before=lambda: calls.append("before"), clock=told_clock)
    taken = interleaved({"a": task}, Plan(rounds=2, per_round=3, warm_up=1, settle=1))
    assert (taken["a"].seconds == 0.25).all()
    assert len(calls) == 1 + 2 * (1 + 3)


def test_rounds_can_be_taken_up_where_they_were_left():
    turns: list[str] = []
    plan = Plan(rounds=5, per_round=1, warm_up=0, settle=0)
    rounds = list(each_round({"a": lambda: None}, plan, first=3, on_turn=turns.append))
    assert len(rounds) == 2 and turns == ["a", "a"]
