"""Percentiles, with linear interpolation between ranks. None stands for "not measured" and is left out."""

import math
from collections.abc import Iterable, Sequence

PERCENTILES = (50, 90, 99)
"""Those that are told of a distribution."""


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """{"p50", "p90", "p99"}; None without values."""
    ordered = known(values)
    return {f"p{percent}": at_percent(ordered, percent) for percent in PERCENTILES} if ordered else None


def percentile(values: Iterable[float | None], percent: float) -> float | None:
    """One of them; None without values."""
    ordered = known(values)
    return at_percent(ordered, percent) if ordered else None


def known(values: Iterable[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None)


def at_percent(ordered: Sequence[float], percent: float) -> float:
    rank = percent / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    if rank == low or ordered[low] == ordered[high]:
        return ordered[low]  # the difference of infinite values is not a number
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
