"""Curve: how the losses of a job went, in few points however long it runs."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from flexjax.server.store import Store

MOST_POINTS = 120
MOST_CURVES = 64
"""Of jobs that the database has, in memory."""


class Thinned:
    """Points at even distances: whenever there are too many, every second one goes, and of those that come later too.

    Attributes:
        newest: the last one taken, kept or not; None before any.
    """

    def __init__(self):
        self._kept: list[tuple[int, float]] = []
        self._stride, self._taken = 1, 0
        self.newest: tuple[int, float] | None = None

    def take(self, step: int, value: float) -> None:
        """Steps that were taken before, or later ones, are told again after a fault; they are passed over."""
        if self.newest is not None and step <= self.newest[0]:
            return
        self.newest = step, value
        if self._taken % self._stride == 0:
            self._kept.append(self.newest)
        self._taken += 1
        if len(self._kept) >= MOST_POINTS:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def points(self) -> list[tuple[int, float | None]]:
        """(step, value), the newest among them; None where it was no number."""
        missing = [] if self.newest is None or self._kept[-1][0] == self.newest[0] else [self.newest]
        return [(step, value if isfinite(value) else None) for step, value in (*self._kept, *missing)]


class Curve:
    """Attributes:
    total_steps: of the job; None before its first step.
    """

    def __init__(self):
        self.train, self.validation = Thinned(), Thinned()
        self.total_steps: int | None = None

    def take(self, data: Mapping[str, Any]) -> None:
        """Data of an event of the type "metrics", as `job_events` makes them."""
        self.total_steps = data.get("total_steps", self.total_steps)
        for name, points in (("train_loss", self.train), ("valid_loss", self.validation)):
            if name in data:
                points.take(data["step"], data[name])

    @property
    def step(self) -> int:
        """The newest one with a loss."""
        return self.train.newest[0] if self.train.newest else 0


class Curves:
    """Of the jobs in a database: read when somebody first looks, and then kept up. Any thread may call it."""

    def __init__(self, store: Store):
        self._store = store
        self._curves: dict[str, Curve] = {}

    def of(self, job: str) -> Curve:
        with self._store.writing():  # who writes an event meanwhile waits, so that none is missed
            found = self._curves.pop(job, None)
            self._curves[job] = found = self._read(job) if found is None else found
            if len(self._curves) > MOST_CURVES:
                del self._curves[next(iter(self._curves))]
            return found

    def take(self, job: str, data: Mapping[str, Any]) -> None:
        """Of an event that is being written, in `Store.writing`."""
        if job in self._curves:
            self._curves[job].take(data)

    def _read(self, job: str) -> Curve:
        curve = Curve()
        for row in self._store.rows("events", {"job": job, "type": "metrics"}):
            curve.take(row["data"])
        return curve
