"""What is left of a row of granules."""

from hypothesis import given
from hypothesis import strategies as st

from djinn_zmq.memory.freelist import FreeList

ROOM = 40


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_what_is_free_in_all_and_in_one_piece_is_right_after_any_order_of_takes_and_gives(
    steps: list[tuple[bool, int]],
) -> None:
    free, taken, bitmap = FreeList(), [], [False] * ROOM
    free.give(0, ROOM)
    for give, number in steps:
        if give and taken:
            start, count = taken.pop(number % len(taken))
            bitmap[start : start + count] = [False] * count
            free.give(start, count)
        elif (start := free.take(number)) is not None:
            assert not any(bitmap[start : start + number])
            bitmap[start : start + number] = [True] * number
            taken.append((start, number))
        else:
            assert number > _longest(bitmap)
        assert free.total == bitmap.count(False)
        assert free.largest == _longest(bitmap)


def _longest(bitmap: list[bool]) -> int:
    pieces = "".join("x" if used else "." for used in bitmap).split("x")
    return max(len(piece) for piece in pieces)
