"""Lead: how long before the end of the iteration in flight the next one is begun. It knows clocks only.

Begun too late, the device idles, and every running row waits for what it idles. Begun too early by t seconds, the
next iteration lacks a request that arrives in those t seconds, which then waits for one iteration more. With R rows,
a requests arriving in a second, and iterations of T seconds, a second of lateness costs R, one of earliness a T; the
best lead is then too short in a T / (R + a T) of all iterations (the newsvendor's quantile). With ten requests in a
second, 10 ms, and 8 to 64 rows that is 1 in 80 to 1 in 640: the lead covers what the host needed and how early
iterations ended, in all recent iterations but the worst one.
"""

from collections import deque

RECENT = 128
"""Iterations that are remembered. The worst of them is taken for a hiccup, such as a collection of garbage."""

FEW = 8
"""Until so many are known, the next iteration is begun at once."""

WAKE_SECONDS = 0.0005
"""Of slack: a sleeping thread wakes late. It also lets a prediction that is too long correct itself: an iteration is
seen to end only when the host has time to look, and looking exactly when it was predicted to end would confirm that."""


class Lead:
    """Attributes:
    host: seconds from the decision to begin an iteration until its forward step is on the device's queue.
    share: part of its predicted time that an iteration surely takes.
    """

    def __init__(self):
        self.host, self.share = 0.0, 0.0
        self._host: deque[float] = deque(maxlen=RECENT)
        self._shares: deque[float] = deque(maxlen=RECENT)

    def began(self, seconds: float) -> None:
        """So long did it take to begin an iteration."""
        self._host.append(seconds)
        self.host = sorted(self._host)[-2:][0]

    def ended(self, seconds: float, predicted: float) -> None:
        """An iteration of the device has ended."""
        self._shares.append(seconds / predicted)
        self.share = sorted(self._shares)[:2][-1] if len(self._shares) >= FEW else 0.0

    def begin_at(self, started: float, predicted: float) -> float:
        """When to begin the iteration after one that started at ``started``, seconds on the same clock."""
        return started + self.share * predicted - self.host - WAKE_SECONDS
