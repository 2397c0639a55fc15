"""LatencyModel: how many seconds an iteration will take. It measures nothing itself and knows no request."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flexjax.layout import SlotLayout
from flexjax.scheduler.latency_fit import Sample, fitted, interpolate
from flexjax.scheduler.output import Iteration
from flexjax.scheduler.terms import PROGRAMS, span_of

GUESSED_UPDATE_SECONDS = 1e-3
"""Stands in until something was measured; the first observations replace it."""

SMALLEST_SECONDS = 1e-9
SMALLEST_SPREAD = 0.02
SPREAD_RATE = 0.1
PATIENCE = 100
DRIFT = 0.6
"""An entry that was not used in so many observations goes this share of the way back to its calibrated value, and again
after as many more."""


@dataclass(frozen=True)
class PredictionError:
    """Relative error |predicted - real| / real of the last iterations: median, 99th percentile, how many."""

    p50: float
    p99: float
    count: int


class LatencyModel:
    """Seconds of an iteration as a sum over what it runs.

    ``seconds = overhead + forward[layout] + rows[layout] * row context + tiles[layout] * tile context
    + sum(amount * price[term])``

    The table has one entry per compiled program: ("forward", layout), ("loss", window), ("backward", window),
    ("update",). Shapes are static, so the same program takes the same time but for attention, whose cost grows with
    the K/V positions read: in a decode slot a position is moved for one query, in a tile it is multiplied with 64, so
    each layout has a price for either, ("rows", layout) and ("tiles", layout); and a position that a backward window
    attends to has the price ("span", window).

    ``calibrate`` fits the table from measurements made at the start, by least squares; prices of a layout that was
    not measured are those of the nearest in size.

    ``observe`` corrects the table from each real iteration by normalised least mean squares (Haykin, Adaptive
    Filter Theory, chapter 6) in relative coordinates: with ``x`` the predicted part of a term and ``e`` the error,
    its entry is multiplied by ``1 + rate * e * x / sum(x**2)``. An error counts at most three times the
    running mean relative error, so one hiccup moves little and a lasting change is followed within a few iterations.
    An error is never below minus the prediction, so with ``rate`` at most 0.4 and few terms no entry turns negative.

    Args:
        overhead: seconds that every iteration takes besides its programs.
        rate: share of an error that one observation corrects, in (0, 0.4]; 0 keeps the table as it is.
    """

    def __init__(self, overhead: float = 0.0, rate: float = 0.2):
        if overhead < 0:
            raise ValueError(f"overhead is {overhead}; it must be at least 0 seconds")
        if not 0 <= rate <= 0.4:
            raise ValueError(f"rate is {rate}; it must be in [0, 0.4]")
        self.overhead = overhead
        self.rate = rate
        self.prices: dict[tuple, float] = {}
        self._calibrated: dict[tuple, float] = {}
        self._guessed: dict[tuple, float] = {}
        self._used: dict[tuple, int] = {}
        self._observations = 0
        self._samples: dict[tuple, list[Sample]] = {}
        self._spread = 1.0
        self._errors: deque[float] = deque(maxlen=1024)

    def calibrate(self, key: tuple, seconds: float, context_tokens: int = 0, tile_context: int = 0) -> None:
        """Takes a measurement of one program alone; several of the same program are fitted together.

        Args:
            key: the program's term, of `flexjax.scheduler.terms`.
            context_tokens, tile_context: as in ``Iteration``, or the first as in ``Unit``. Two different ones determine
                a price per position, and a layout's own for tiles if their share differs.
        """
        if seconds <= 0:
            raise ValueError(f"program {key} was measured at {seconds} seconds; it must be more than 0")
        samples = self._samples.setdefault(key, [])
        samples.append(Sample(context_tokens - tile_context, tile_context, seconds))
        base, rows, tiles = fitted(samples)
        found = {key: max(base, SMALLEST_SECONDS)}
        if key[0] == "forward":
            found |= {("rows", key[1]): rows, ("tiles", key[1]): tiles}
        elif (span := span_of(key)) is not None:
            found[span] = rows
        self.prices |= found
        self._calibrated |= found
        self._guessed.clear()

    def predict(
        self, layout: SlotLayout | None, context_tokens: int, work: Mapping[tuple, float], tile_context: int = 0
    ) -> float:
        """Seconds of an iteration with one forward step (or none) and ``work[term]`` of each finetuning term.

        Args:
            tile_context: the part of ``context_tokens`` that tiles read.
        """
        forward = 0.0 if layout is None else self.forward_seconds(layout, context_tokens, tile_context)
        return self.overhead + forward + self.work_seconds(work)

    def forward_seconds(self, layout: SlotLayout, context_tokens: int, tile_context: int = 0) -> float:
        """Seconds of a forward step alone."""
        rows = self.price(("rows", layout)) * (context_tokens - tile_context)
        return self.price(("forward", layout)) + rows + self.price(("tiles", layout)) * tile_context

    def work_seconds(self, work: Mapping[tuple, float]) -> float:
        """Seconds of finetuning units."""
        return sum(amount * self.price(term) for term, amount in work.items())

    def price(self, term: tuple) -> float:
        """Seconds of one call without context, or of one position: from the table, else from terms of its kind."""
        known = self.prices.get(term)
        if known is None and (known := self._guessed.get(term)) is None:
            known = self._guessed[term] = self._inferred(term)
        return known

    def observe(self, iteration: Iteration, seconds: float) -> None:
        """Corrects the table with what an iteration really took."""
        self._errors.append(abs(iteration.predicted - seconds) / max(seconds, SMALLEST_SECONDS))
        parts = self._parts(iteration)
        predicted = sum(parts.values())
        self._observations += 1
        self._used |= dict.fromkeys(parts, self._observations)
        if self._observations % PATIENCE == 0:
            self._drift()
        squares = sum(part * part for part in parts.values())
        if not squares:
            return
        error = max(seconds - self.overhead - predicted, -predicted)
        bound = 3 * self._spread * predicted
        self._spread += SPREAD_RATE * (min(abs(error) / predicted, 1.0) - self._spread)
        self._spread = max(self._spread, SMALLEST_SPREAD)
        error = min(max(error, -bound), bound)
        for term, part in parts.items():
            smallest = SMALLEST_SECONDS if term[0] in PROGRAMS else 0.0
            self.prices[term] = max(self.price(term) * (1 + self.rate * error * part / squares), smallest)

    def _drift(self) -> None:
        """Move entries that are not used towards their calibrated values: one that a hiccup has raised above every
        limit would otherwise never be tried, and so never corrected."""
        for term, calibrated in self._calibrated.items():
            if self._observations - self._used.get(term, 0) >= PATIENCE and self.prices[term]:
                self.prices[term] *= (calibrated / self.prices[term]) ** DRIFT

    def errors(self) -> PredictionError:
        """How well recent iterations were predicted when they were planned."""
        ranked = sorted(self._errors)
        if not ranked:
            return PredictionError(0.0, 0.0, 0)
        return PredictionError(ranked[len(ranked) // 2], ranked[int(0.99 * (len(ranked) - 1))], len(ranked))

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        prices = [[encode_key(term), seconds] for term, seconds in self.prices.items()]
        content = {"overhead": self.overhead, "rate": self.rate, "prices": prices}
        Path(path).write_text(json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyModel":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is not such a table; delete it to have the programs measured again.
        """
        try:
            content = json.loads(Path(path).read_text())
            model = cls(content["overhead"], content["rate"])
            model.prices = {decode_key(term): float(seconds) for term, seconds in content["prices"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a latency table ({error}); delete it to measure again") from error
        return model

    def _parts(self, iteration: Iteration) -> dict[tuple, float]:
        """Predicted seconds of each term of an iteration."""
        parts = {term: amount * self.price(term) for term, amount in iteration.work.items()}
        if (layout := iteration.layout) is not None:
            rows = iteration.context_tokens - iteration.tile_context
            parts["forward", layout] = self.price(("forward", layout))
            parts["rows", layout] = self.price(("rows", layout)) * rows
            parts["tiles", layout] = self.price(("tiles", layout)) * iteration.tile_context
        return parts

    def _inferred(self, term: tuple) -> float:
        if term == ("update",):
            return GUESSED_UPDATE_SECONDS
        points = {size_of(known[1]): price for known, price in self.prices.items() if known[0] == term[0]}
        size = size_of(term[1])
        if term[0] in PROGRAMS:
            return interpolate(points, size)
        return points[min(points, key=lambda point: abs(point - size))] if points else 0.0


def size_of(place: SlotLayout | int) -> int:
    """Slots of a layout or window."""
    return place.slots if isinstance(place, SlotLayout) else place


def encode_key(key: tuple) -> list:
    return [asdict(part) if isinstance(part, SlotLayout) else part for part in key]


def decode_key(parts: list) -> tuple:
    return tuple(SlotLayout(**part) if isinstance(part, dict) else part for part in parts)
