"""WaitingQueue: requests without a row, the most senior first. It knows no clock of its own."""

import heapq

from flexjax.scheduler.sequence import Sequence


class WaitingQueue:
    """Two heaps by seniority. Every operation is O(log n); removed requests leave a heap when they reach its top.

    Requests that can no longer have their first token in time stand behind those of the same priority that can: when
    more come than can be served, serving them in turn would make everybody late.

    Attributes:
        tokens: of all waiting requests, prompt and outputs.
    """

    def __init__(self):
        self.tokens = 0
        self._heap: list[tuple[tuple, Sequence]] = []
        self._late: list[tuple[tuple, Sequence]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.id in self._members

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.seniority, sequence))
        self._members.add(sequence.request.id)
        self.tokens += len(sequence.tokens)

    def peek(self, late_before: float | None = None, lost_before: float | None = None) -> Sequence | None:
        """The request to be seated next, or None.

        Args:
            late_before: a request without an output that arrived earlier is late; None: none ever is.
            lost_before: one that arrived even earlier has waited long enough and is late no more.
        """
        first = self._top(self._heap)
        while first is not None and late_before is not None and first.late(late_before):
            heapq.heappush(self._late, heapq.heappop(self._heap))
            first = self._top(self._heap)
        late = self._top(self._late)
        if late is None or first is None:
            return first if late is None else late
        lost = late_before is None or (lost_before is not None and late.request.arrival < lost_before)
        return min(first, late, key=lambda each: (each.request.priority, each is late and not lost, each.seniority))

    def remove(self, sequence: Sequence) -> None:
        """Takes out a request that is in the queue."""
        self._members.remove(sequence.request.id)
        self.tokens -= len(sequence.tokens)
        if len(self._heap) + len(self._late) > 2 * len(self._members) + 16:
            for heap in (self._heap, self._late):
                heap[:] = [item for item in heap if item[1] in self]
                heapq.heapify(heap)

    def _top(self, heap: list[tuple[tuple, Sequence]]) -> Sequence | None:
        while heap and heap[0][1] not in self:
            heapq.heappop(heap)
        return heap[0][1] if heap else None
