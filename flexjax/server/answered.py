"""Answered: how many requests were answered how, by their route, as the exporter that vLLM uses counts them."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from starlette.types import Scope

NO_ROUTE = "none"
"""Of requests without a key, or to paths that are not there: anyone may make up their paths."""


class Answered:
    """On the event loop."""

    def __init__(self):
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def take(self, scope: Scope, status: int | None) -> None:
        """A request has ended.

        Args:
            status: that was sent; None if the client had gone before.
        """
        self._counts[scope["method"], route_of(scope), "none" if status is None else f"{status // 100}xx"] += 1

    def families(self) -> Iterator[Metric]:
        names = ("method", "handler", "status")
        family = CounterMetricFamily("http_requests", "Requests that have ended, by the answer.", labels=names)
        for labels, count in self._counts.items():
            family.add_metric(labels, count)
        yield family


def route_of(scope: Scope) -> str:
    """The path with the names of its parameters; several paths may have one endpoint."""
    if "endpoint" not in scope:
        return NO_ROUTE
    mine = (route for route in scope["app"].routes if route.endpoint is scope["endpoint"])
    return next((route.path for route in mine if route.path_regex.match(scope["path"])), NO_ROUTE)
