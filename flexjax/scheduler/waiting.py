"""WaitingQueue: requests without a row, the most senior first."""

import heapq

from flexjax.scheduler.sequence import Sequence


class WaitingQueue:
    """A heap by seniority. Every operation is O(log n); removed requests leave the heap when they reach its top.

    Attributes:
        tokens: of all waiting requests, prompt and outputs.
    """

    def __init__(self):
        self.tokens = 0
        self._heap: list[tuple[tuple, Sequence]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.id in self._members

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.seniority, sequence))
        self._members.add(sequence.request.id)
        self.tokens += len(sequence.tokens)

    def peek(self) -> Sequence | None:
        """The most senior request, or None."""
        while self._heap and self._heap[0][1] not in self:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Takes out a request that is in the queue."""
        self._members.remove(sequence.request.id)
        self.tokens -= len(sequence.tokens)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [item for item in self._heap if item[1] in self]
            heapq.heapify(self._heap)
