"""Histogram: counts of values between bounds. Observing costs well under a microsecond, since every token does it."""

from bisect import bisect_left

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Args:
    bounds: upper ends of the classes, ascending; a value equal to one belongs below it, as Prometheus has it.
    """

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, labels: dict[str, str]) -> HistogramMetricFamily:
        """As Prometheus shows it: each class counts what the smaller ones do too."""
        family = HistogramMetricFamily(name, text, labels=list(labels))
        buckets, below = [], 0
        for bound, count in zip((*map(float, self._bounds), float("inf")), self._counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family
