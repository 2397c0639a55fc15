"""WaitingQueue: requests without a row, the most senior first. It knows no clock of its own."""

import heapq
import math

from flexjax.layout import tiles_for
from flexjax.scheduler.sequence import Sequence

LOOK_SECONDS = 0.2
"""Between two looks for requests to be given up, for each thousand that wait, or fewer."""

OTHERS_FIRST = 9
"""Tiles of other requests that go first for each tile of one that had waited long enough: while more come than can be
served for long, those that have waited would otherwise take everything, and everybody would be late."""


class WaitingQueue:
    """Two heaps by seniority. Every operation but `give_up` is O(log n); removed requests leave a heap when they reach
    its top.

    Requests that can no longer have their first token in time stand behind those of the same priority that can: when
    more come than can be served, serving them in turn would make everybody late. `give_up` sends others there too,
    who could be in time alone, but in whose stead more can. Those who have stood there for long enough get a share:
    they are first again, one after every ``OTHERS_FIRST`` times its tiles of others.

    Attributes:
        tokens: of all waiting requests, prompt and outputs.
    """

    def __init__(self):
        self.tokens = 0
        self._heap: list[tuple[tuple, Sequence]] = []
        self._late: list[tuple[tuple, Sequence]] = []
        self._members: set[int] = set()
        self._looked = -math.inf
        self._tiles_owed = 0

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
            lost_before: one that arrived even earlier has waited long enough and is late no more, when it is such
                ones' turn.
        """
        first = self._top(self._heap)
        while first is not None and late_before is not None and first.late(late_before):
            heapq.heappush(self._late, heapq.heappop(self._heap))
            first = self._top(self._heap)
        late = self._top(self._late)
        if late is None or first is None:
            return first if late is None else late
        lost = late_before is None or (self._tiles_owed <= 0 and _lost(late, lost_before))
        return min(first, late, key=lambda each: (each.request.priority, each is late and not lost, each.seniority))

    def give_up(self, late_before: float | None, pace: float | None) -> None:
        """Lets requests with long prompts go behind as if they were late, where that makes fewer late in all.

        Moore and Hodgson's algorithm (Management Science 15(1), 1968) for each priority: in the order in which they are
        served, whenever one would be late, the longest up to it is given up. The shortest of a priority keep their
        turn, since nobody gains by their going, unless they would be late even as the first. Those given up earlier,
        and not late yet, are decided on anew: the pace was an estimate. O(n log n).

        Args:
            late_before: as in `peek`.
            pace: tiles of prompts that are taken in a second; None: unknown, and nobody is given up any more.
        """
        if late_before is None or late_before < self._looked + LOOK_SECONDS * max(1.0, len(self) / 1000):
            return
        self._looked = late_before
        behind = [item for item in self._late if item[1] in self]
        early = [item for item in behind if not item[1].late(late_before)]
        if pace is None and not early:
            return
        waiting = sorted([item for item in self._heap if item[1] in self] + early)
        given = set() if pace is None else _for_fewest_late([each for _, each in waiting], late_before, pace)
        late = [item for item in behind if item[1].late(late_before)]
        self._late = late + [item for item in waiting if item[1].request.id in given]
        heapq.heapify(self._late)
        self._heap = [item for item in waiting if item[1].request.id not in given]

    def take(self, sequence: Sequence, lost_before: float | None = None) -> None:
        """Takes out a request that is seated; ``lost_before`` as in `peek`."""
        tiles = tiles_for(len(sequence.tokens))
        lost = _lost(sequence, lost_before)
        self._tiles_owed = OTHERS_FIRST * tiles if lost else max(0, self._tiles_owed - tiles)
        self.remove(sequence)
        for heap in (self._heap, self._late):  # it may be preempted and come back, and must not stand in both then
            self._top(heap)

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


def _lost(sequence: Sequence, lost_before: float | None) -> bool:
    return lost_before is not None and sequence.late(lost_before)


def _for_fewest_late(waiting: list[Sequence], late_before: float, pace: float) -> set[int]:
    """Ids of those to be given up; ``waiting`` is in order of seniority. See `WaitingQueue.give_up`.

    A begun answer is late no more and keeps its turn, and nobody is given up for a lower priority's sake.
    """
    lengths = [tiles_for(len(sequence.tokens)) for sequence in waiting]
    shortest: dict[int, int] = {}
    for sequence, tiles in zip(waiting, lengths, strict=True):
        if not _begun(sequence):
            priority = sequence.request.priority
            shortest[priority] = min(tiles, shortest.get(priority, tiles))
    given: set[int] = set()
    longest: list[tuple[int, int]] = []
    ahead, priority = 0, None
    for place, (sequence, tiles) in enumerate(zip(waiting, lengths, strict=True)):
        request = sequence.request
        if request.priority != priority:
            longest, priority = [], request.priority
        ahead += tiles
        if _begun(sequence):
            continue
        heapq.heappush(longest, (-tiles, -place))
        room = (request.arrival - late_before) * pace
        if ahead > room:
            saved, dropped = heapq.heappop(longest)
            ahead += saved
            if -saved > shortest[priority] or tiles > room:
                given.add(waiting[-dropped].request.id)
    return given


def _begun(sequence: Sequence) -> bool:
    """Some of its answer is known."""
    return len(sequence.tokens) > len(sequence.request.prompt)
