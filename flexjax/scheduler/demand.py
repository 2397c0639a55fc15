"""Demand and Pace: what requests take a second, now, over a longer time, and while others wait. They know no layout and
no objective."""

import math

NOW_SECONDS, LATELY_SECONDS = 2.0, 30.0
"""Over which the two means fade."""

RISE = 1.3
"""Times its longer mean that demand must be to count as rising."""

PACE_KNOWN = 0.5
"""Seconds that requests must have waited, lately, before their pace is known."""


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


class Pace:
    """How fast prompts are taken in while requests wait: a mean that fades like `Demand`'s, of that time alone."""

    def __init__(self):
        self._sum = self._weight = 0.0
        self._at: float | None = None
        self._last: int | None = None

    @property
    def tiles_per_second(self) -> float | None:
        """None while unknown."""
        known = self._weight >= 1 - math.exp(-PACE_KNOWN / NOW_SECONDS)
        return self._sum / self._weight if known else None

    def note(self, now: float, tiles: int, waiting: bool) -> None:
        """The iteration that is planned at ``now`` takes in so many tiles of prompts; ``waiting``: it leaves requests
        waiting that it had rows and pages for. The one before has taken the time since then."""
        if self._at is not None and now > self._at:
            seconds = now - self._at
            fade = math.exp(-seconds / NOW_SECONDS)
            self._sum, self._weight = fade * self._sum, fade * self._weight
            if self._last is not None:
                self._sum += (1 - fade) * self._last / seconds
                self._weight += 1 - fade
        self._at, self._last = now, tiles if waiting else None
