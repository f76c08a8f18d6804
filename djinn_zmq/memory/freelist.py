"""The free pieces of a row of granules: what an arena or a device slab has left to lease."""

import bisect


class FreeList:
    """Pieces (first granule, count), sorted, never adjacent. First fit."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []

    @property
    def total(self) -> int:
        """Granules free in all."""
        return sum(count for _, count in self._pieces)

    @property
    def largest(self) -> int:
        """Granules of the longest piece."""
        return max((count for _, count in self._pieces), default=0)

    def take(self, need: int) -> int | None:
        """The first of *need* granules, or None where no piece is long enough."""
        for place, (start, count) in enumerate(self._pieces):
            if count < need:
                continue
            if count == need:
                del self._pieces[place]
            else:
                self._pieces[place] = (start + need, count - need)
            return start
        return None

    def give(self, start: int, count: int) -> None:
        """*count* granules from *start* on are free again."""
        place = bisect.bisect(self._pieces, (start, 0))
        if place < len(self._pieces) and self._pieces[place][0] == start + count:
            count += self._pieces.pop(place)[1]
        if place and sum(self._pieces[place - 1]) == start:
            before, more = self._pieces[place - 1]
            self._pieces[place - 1] = (before, more + count)
        else:
            self._pieces.insert(place, (start, count))
