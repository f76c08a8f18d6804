"""A caller's words for where a run stops, and what they are as data."""

from functools import reduce
from operator import and_, or_
from typing import Any

import numpy as np
import pytest

from djinn_zmq.client.stops import Break, HasNaN, Norm, Step, Token, breaks_of, wanted_of
from djinn_zmq.errors import LayerError, RequestError, StopError
from djinn_zmq.wire import stops as wire


def test_a_condition_is_shown_as_it_was_written() -> None:
    written = (HasNaN() | Norm(">", 2)) & Step(1)
    assert repr(written) == '((HasNaN() | Norm(">", 2)) & Step(1))'
    assert repr(Break(when=Token("a"))) == "Break(when=Token('a'))"
    assert repr(Break(0)) == "Break(0)"
    assert repr(Break("norm", when=HasNaN())) == "Break('norm', when=HasNaN())"


def test_a_condition_is_neither_true_nor_false_here() -> None:
    for joined in (lambda: HasNaN() and Step(1), lambda: HasNaN() or Step(1)):
        with pytest.raises(StopError, match="evaluated on the engine"):
            joined()
    with pytest.raises(StopError, match="3 is no condition"):
        HasNaN() | 3  # type: ignore[operator]


def test_conditions_are_joined_as_all_ways_in_which_they_can_hold() -> None:
    one, two, three = (Step(number)._on_wire[0][0] for number in (1, 2, 3))
    assert (Step(1) | Step(2) & Step(3))._on_wire == ((one,), (two, three))
    assert ((Step(1) | Step(2)) & Step(3))._on_wire == ((one, three), (two, three))


@pytest.mark.parametrize(("join", "one"), [(or_, HasNaN()), (and_, HasNaN())])
def test_a_condition_holds_as_many_tests_as_travel_and_not_one_more(join: Any, one: HasNaN) -> None:
    whole = reduce(join, [one] * wire.TESTS_LIMIT)
    assert sum(map(len, whole._on_wire)) == wire.TESTS_LIMIT
    with pytest.raises(StopError, match=f"{wire.TESTS_LIMIT + 1} tests: at most"):
        join(whole, one)


def test_what_is_saved_is_named_once_and_all_is_from_where_a_run_begins_to_where_it_stops() -> None:
    both = wanted_of(None, [2, "b", np.int64(1), 2, "a", "b"], "last", 0, 4)
    assert both.save_at == (1, 2) and both.stop_at == wire.Stops((), ("b", "a"))
    assert wanted_of(None, (2, 1), "last", 0, 4).save_at == (1, 2)
    assert (
        wanted_of(None, None, "last", 0, 4).save_at
        == wanted_of(None, [], "last", 0, 4).save_at
        == ()
    )
    assert wanted_of(3, "all", "last", 1, 4).save_at == (1, 2, 3)
    for one in (
        wanted_of(["norm", 3], "all", "last", 1, 4),
        wanted_of(3, "all", "last", 1, 4, "a"),
    ):
        assert (one.save_at, one.stop_at.saves) == ((), ("all",))  # the engine knows which
    stop = wanted_of(3, "a", "last", 0, 4).stop_at
    assert stop == wire.Stops((wire.Break(3, ()),), ("a",))


def test_all_up_to_a_stop_that_no_model_has_is_not_counted_up_to_it() -> None:
    wanted = wanted_of(10**15, "all", "last", 0, 4)  # for the engine to refuse
    assert (wanted.stop_at, wanted.save_at) == (10**15, (0, 1, 2, 3, 4))


def test_of_the_likeliest_logits_one_can_be_asked_for_and_none_cannot() -> None:
    assert wanted_of(None, (), 1, 0, 4).top == 1 and wanted_of(None, (), "all", 0, 4).top == 0
    for wrong in (0, -1, True, 1.0, "some", None):
        with pytest.raises(RequestError, match="or how many of the likeliest, 1 or more"):
            wanted_of(None, (), wrong, 0, 4)  # type: ignore[arg-type]


def test_no_breakpoints_are_none_and_a_run_needs_a_place() -> None:
    assert breaks_of(None) == breaks_of([]) == breaks_of(()) == ()
    assert breaks_of(2) == breaks_of([2]) == (wire.Break(2, ()),)
    assert breaks_of([0, Break(" x ", when=HasNaN())])[1] == wire.Break("x", ((wire.HasNaN(),),))
    with pytest.raises(LayerError, match="at least one place"):
        wanted_of([], (), "last", 0, 4)


def test_a_bound_may_be_any_number_that_numpy_has() -> None:
    for bound in (2, 2.0, np.float32(2), np.int64(2), np.array(2.0)):
        assert Norm(">", bound)._on_wire == ((wire.Norm(">", 2.0),),)  # type: ignore[arg-type]


def test_what_is_no_condition_is_refused_by_what_it_is() -> None:
    for wrong, text in (
        (lambda: Norm(">", "much"), "and a number"),  # type: ignore[arg-type]
        (lambda: Norm(">", "50"), r"Norm\('>', '50'\): text, such as"),  # type: ignore[arg-type]
        (lambda: Norm(">", b"50"), "and a number"),  # type: ignore[arg-type]
        (lambda: Norm(">", True), "and a number"),
        (lambda: Norm(">", np.True_), "and a number"),  # type: ignore[arg-type]
        (lambda: Norm(">", None), "and a number"),  # type: ignore[arg-type]
        (lambda: Norm(50, 1.0), r"Norm\(50, 1.0\): text"),  # type: ignore[arg-type]
        (lambda: Norm(">", np.nan), r"Norm\('>', nan\): text.* and a number"),
        (lambda: Step(-1), "Step=-1: a whole number, 0 or more"),
        (lambda: Token(b"is"), "text, or an id"),  # type: ignore[arg-type]
        (lambda: Step("1"), "a whole number"),  # type: ignore[arg-type]
        (lambda: Token(True), "text, or an id"),
        (lambda: Token(1.5), "text, or an id"),  # type: ignore[arg-type]
        (lambda: Step(True), "a whole number"),
        (lambda: Break(), "a place, a condition, or both"),
        (lambda: Break(2, when="nan"), "use HasNaN, Norm"),  # type: ignore[arg-type]
    ):
        with pytest.raises(StopError, match=text):
            wrong()
