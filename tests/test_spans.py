import pytest

from djinn_zmq.spans import Spans, Stopwatch


def test_a_span_is_found_by_place_and_by_name() -> None:
    spans = Spans((("wire", 10), ("layers", 30)))
    assert spans[0] == ("wire", 10)
    assert spans[1:] == (("layers", 30),)
    assert spans["layers"] == 30
    assert spans.total_ns == 40
    with pytest.raises(KeyError):
        spans["lanes"]


def test_the_table_is_aligned_and_adds_up() -> None:
    assert str(Spans((("wire", 10_000), ("layers", 30_000)))).splitlines() == [
        "span            us   share",
        "wire          10.0   25.0%",
        "layers        30.0   75.0%",
        "total         40.0  100.0%",
    ]


def test_no_spans_are_still_a_table() -> None:
    assert Spans().total_ns == 0
    assert len(str(Spans()).splitlines()) == 2
    assert "0.0" in str(Spans((("nothing", 0),)))


def test_a_stopwatch_adds_up_by_name_in_the_order_of_first_sight() -> None:
    watch = Stopwatch()
    watch.add("b", 1)
    watch.add("a", 2)
    watch.add("b", 3)
    assert list(watch.spent.items()) == [("b", 4), ("a", 2)]


def test_a_span_ends_also_where_something_is_raised() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError), watch.span("failing"):
        raise ValueError
    assert 0 < watch.spent["failing"] <= watch.elapsed_ns()


def test_what_no_span_covers_is_the_rest() -> None:
    watch = Stopwatch(start_ns=0)
    watch.add("layers", 5)
    first, last = watch.with_rest("wire", first=True), watch.with_rest("wire", first=False)
    assert [name for name, _ in first] == ["wire", "layers"]
    assert [name for name, _ in last] == ["layers", "wire"]
    assert 0 < sum(ns for _, ns in first) <= sum(ns for _, ns in last) <= watch.elapsed_ns()


def test_spans_that_overlap_leave_a_rest_of_nothing() -> None:
    watch = Stopwatch()
    watch.add("too long", 10**18)
    assert watch.with_rest("rest", first=True)[0] == ("rest", 0)
