"""Seats: which running sequence sits in which row."""

import heapq
from bisect import insort

from flexjax.scheduler.sequence import Sequence


class Seats:
    """Rows 0 .. rows-1. The lowest free row is given first, so that the rows in use stay close to a prefix.

    Attributes:
        running: seated sequences, the most senior first.
    """

    def __init__(self, rows: int):
        self.rows: list[Sequence | None] = [None] * rows
        self.running: list[Sequence] = []
        self._free = list(range(rows))

    @property
    def lowest_free(self) -> int | None:
        return self._free[0] if self._free else None

    def take(self, sequence: Sequence) -> int:
        """Gives the lowest free row, which must exist."""
        row = heapq.heappop(self._free)
        self.rows[row] = sequence
        insort(self.running, sequence, key=lambda member: member.seniority)
        return row

    def leave(self, sequence: Sequence) -> None:
        """Frees the row of a seated sequence."""
        self.rows[sequence.row] = None
        heapq.heappush(self._free, sequence.row)
        self.running.remove(sequence)

    def junior_to(self, sequence: Sequence) -> Sequence | None:
        """The most junior running sequence, or None if that is ``sequence`` itself."""
        return None if self.running[-1] is sequence else self.running[-1]

    def check(self) -> None:
        """Asserts that rows, running sequences and free rows agree."""
        seated = {row: sequence for row, sequence in enumerate(self.rows) if sequence is not None}
        assert all(sequence.row == row for row, sequence in seated.items()), "a sequence does not know its row"
        assert sorted(self._free) == sorted(set(range(len(self.rows))) - set(seated)), "free rows are wrong"
        assert sorted(map(id, self.running)) == sorted(map(id, seated.values())), "running sequences are wrong"
        order = [sequence.seniority for sequence in self.running]
        assert order == sorted(order), "running sequences are out of order"
