"""The free pieces of a row of granules: what an arena or a device slab has left to lease."""

import bisect


class FreeList:
    """Pieces (first granule, count), sorted, never adjacent. First fit.

    total: granules free in all. largest: of the longest piece. Kept, since hundreds of arenas are asked
    for them where one slot is wanted.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []
        self.total = 0
        self.largest = 0

    def take(self, need: int) -> int | None:
        """The first of *need* granules, or None where no piece is long enough."""
        if need > self.largest:
            return None
        for place, (start, count) in enumerate(self._pieces):
            if count < need:
                continue
            if count == need:
                del self._pieces[place]
            else:
                self._pieces[place] = (start + need, count - need)
            self.total -= need
            if count == self.largest:
                self.largest = max((count for _, count in self._pieces), default=0)
            return start
        return None

    def give(self, start: int, count: int) -> None:
        """*count* granules from *start* on are free again."""
        self.total += count
        place = bisect.bisect(self._pieces, (start, 0))
        if place < len(self._pieces) and self._pieces[place][0] == start + count:
            count += self._pieces.pop(place)[1]
        if place and sum(self._pieces[place - 1]) == start:
            start, before = self._pieces[place - 1]
            count += before
            self._pieces[place - 1] = (start, count)
        else:
            self._pieces.insert(place, (start, count))
        self.largest = max(self.largest, count)
