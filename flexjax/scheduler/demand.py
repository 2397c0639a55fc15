"""Demand: how many slots a second requests take, now and over a longer time. It knows no layout and no objective."""

import math

NOW_SECONDS, LATELY_SECONDS = 2.0, 30.0
"""Over which the two means fade."""

RISE = 1.3
"""Times its longer mean that demand must be to count as rising."""


class Demand:
    """Exponentially fading means of what iterations served.

    Attributes:
        rows: decode slots a second, now; chunk: slots of prompt tiles a second, now.
        lately: of both together, over a longer time.
    """

    def __init__(self):
        self.rows = self.chunk = self.lately = 0.0
        self._at: float | None = None
        self._last = (0, 0)

    @property
    def slots(self) -> float:
        """A second, now."""
        return self.rows + self.chunk

    @property
    def rises(self) -> bool:
        """Clearly more is asked for than lately: a burst may have begun."""
        return self.slots > RISE * self.lately

    @property
    def row_share(self) -> float:
        """Of decode slots in all; 0 if nothing is served."""
        return self.rows / self.slots if self.slots else 0.0

    def note(self, now: float, rows: int, chunk: int) -> None:
        """The iteration that is planned at ``now`` serves so many decode slots and slots of prompt tiles; the one
        before has taken the time since then."""
        if self._at is not None and now > self._at:
            seconds = now - self._at
            fade, slowly = math.exp(-seconds / NOW_SECONDS), math.exp(-seconds / LATELY_SECONDS)
            before = [slots / seconds for slots in self._last]
            self.rows = fade * self.rows + (1 - fade) * before[0]
            self.chunk = fade * self.chunk + (1 - fade) * before[1]
            self.lately = slowly * self.lately + (1 - slowly) * sum(before)
        self._at, self._last = now, (rows, chunk)
