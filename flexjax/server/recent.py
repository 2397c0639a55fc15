"""Seconds: what happened in each of the newest seconds. A minute of it is what the dashboard shows at once."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import exp, floor, log

KEPT = 60
"""Whole seconds."""

CLASSES = 20
"""Of a `Spread`, for each factor of e: quantiles are within 2.5 % of what was observed."""

SMALLEST = 1e-6


class Seconds[Slot]:
    """One slot for each second. One thread.

    Args:
        make: an empty slot.
    """

    def __init__(self, make: Callable[[], Slot]):
        self._make, self._slots = make, {}

    def at(self, moment: float) -> Slot:
        """The slot of a moment, which is not much before the newest one asked for."""
        second = floor(moment)
        found = self._slots.get(second)
        if found is None:
            found = self._slots[second] = self._make()
            for old in [each for each in self._slots if each < second - KEPT]:
                del self._slots[old]
        return found

    def whole(self, now: float) -> list[Slot | None]:
        """Of the seconds that have ended, the oldest first; None where nothing happened."""
        return [self._slots.get(second) for second in range(floor(now) - KEPT, floor(now))]


class Spread:
    """How durations are spread, in classes of equal ratio. Every token observes one, so it must cost little."""

    def __init__(self):
        self.counts: Counter[int] = Counter()

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[floor(CLASSES * log(max(seconds, SMALLEST)))] += times


def quantile(spreads: Iterable[Spread], part: float) -> float | None:
    """Seconds that ``part`` of all observations did not exceed, to the middle of a class; None without any."""
    counts = sum((each.counts for each in spreads), Counter())
    left = part * counts.total()
    for place in sorted(counts):
        left -= counts[place]
        if left <= 0:
            return exp((place + 0.5) / CLASSES)
    return None


@dataclass
class Served:
    """Attributes:
    tokens: generated.
    ttft: from arrival to the first token; itl: between two tokens of a sequence.
    tpot: mean over the tokens after the first of a sequence that has ended.
    """

    tokens: int = 0
    ttft: Spread = field(default_factory=Spread)
    itl: Spread = field(default_factory=Spread)
    tpot: Spread = field(default_factory=Spread)
