"""Fitting of the latency table: measurements become prices, and sizes that were not measured take those of others."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

GUESSED_SECONDS_PER_SLOT = 1e-5
"""Stands in until something was measured; the first observations replace it."""


def interpolate(points: Mapping[int, float], size: int) -> float:
    """Seconds at ``size`` from seconds measured at other sizes.

    Linear between two neighbours; in proportion above the largest; the smallest's own below it, because small
    steps wait for memory; a guess if nothing was measured.
    """
    below = max((point for point in points if point <= size), default=None)
    above = min((point for point in points if point >= size), default=None)
    if below is None and above is None:
        return GUESSED_SECONDS_PER_SLOT * size
    if below is None:
        return points[above]
    if above is None:
        return points[below] * size / below
    if above == below:
        return points[below]
    share = (size - below) / (above - below)
    return points[below] + share * (points[above] - points[below])


class Sample(NamedTuple):
    """A measurement: positions that rows, and that tiles, attended to (a unit's are the former), and its seconds."""

    rows: int
    tiles: int
    seconds: float


def fitted(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Least-squares (seconds without context, per row position, per tile position), none below 0.

    Where rows and tiles grow together, one price serves both; where nothing grows, it is 0.
    """
    means = [fmean(column) for column in zip(*samples, strict=True)]
    rows, tiles, seconds = ([value - mean for value in column] for column, mean in zip(zip(*samples), means))  # noqa: B905
    square, other, mixed = dot(rows, rows), dot(tiles, tiles), dot(rows, tiles)
    determinant = square * other - mixed * mixed
    if determinant > 1e-6 * square * other:
        per_row = (other * dot(rows, seconds) - mixed * dot(tiles, seconds)) / determinant
        per_tile = (square * dot(tiles, seconds) - mixed * dot(rows, seconds)) / determinant
    else:
        both = [row + tile for row, tile in zip(rows, tiles, strict=True)]
        per_row = per_tile = dot(both, seconds) / dot(both, both) if any(both) else 0.0
    per_row, per_tile = max(per_row, 0.0), max(per_tile, 0.0)
    return means[2] - per_row * means[0] - per_tile * means[1], per_row, per_tile


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
