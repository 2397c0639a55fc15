"""Capacity: the highest rate of a trace's shape that inference alone holds, 99 of 100 requests content; see `RULE`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexjax.bench.coserve_metrics import Objective
from flexjax.bench.replay import ReplayedRequest

RULE = """A trial replays the beginning of the trace with its arrivals scaled in time by one factor, lengths kept (the
whole of it again and again if it is too short then), until all have ended or more than 1 in 100 have missed. From
where the search begins rates grow until one fails (or shrink until one holds), first by the precision, then by its
square, its fourth power and so on, at most by half. Then the middle of the highest that held below the lowest that
failed, in ratio, is tried, until these two are within the precision. The capacity is the rate that held. A short trial
leaves a queue no time to grow, so it is rather too high than too low."""

MOST_GROWTH = 1.5
HOPELESS = 50
"""How many times less than where the search began it ends if nothing held."""

MISSES = 0.01
"""Share of the requests that may miss the objective."""


@dataclass(frozen=True)
class Trial:
    """Requests per second, and whether they were held."""

    rate: float
    held: bool


def highest_held(trials: Iterable[Trial]) -> float:
    """0 if none held. A rate above one that failed does not count."""
    trials = list(trials)
    failed = lowest_failed(trials)
    return max((each.rate for each in trials if each.held and each.rate < failed), default=0.0)


def lowest_failed(trials: Iterable[Trial]) -> float:
    """Infinite if none failed."""
    return min((each.rate for each in trials if not each.held), default=math.inf)


def next_rate(trials: Sequence[Trial], first: float, precision: float) -> float | None:
    """What to try next; None if the search has ended. Begun where the capacity is, it ends after two trials.

    Args:
        first: rate at which a search begins that has no trials yet.
    """
    held, failed = highest_held(trials), lowest_failed(trials)
    if not trials:
        return first
    growth = math.exp(min(2.0 ** (len(trials) - 1) * math.log(precision), math.log(MOST_GROWTH)))
    if math.isinf(failed):
        return held * growth
    if not held:
        return failed / growth if failed > trials[0].rate / HOPELESS else None
    return math.sqrt(held * failed) if failed / held > precision else None


@dataclass(frozen=True)
class Misses:
    """Counts requests that cannot be content any more, while they run.

    Attributes:
        total: requests of the trial.
    """

    objective: Objective
    total: int

    def too_many(self, requests: Sequence[ReplayedRequest]) -> bool:
        """The trial has failed whatever becomes of the others."""
        return sum(map(self.missed, list(requests))) > MISSES * self.total

    def missed(self, request: ReplayedRequest) -> bool:
        """Refused, or its first token is late; what comes after is judged at the end."""
        first = request.times[0] if request.times else request.clock()
        return request.error is not None or first - request.due >= self.objective.ttft
