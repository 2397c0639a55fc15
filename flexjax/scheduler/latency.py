"""LatencyModel: how many seconds an iteration will take. It measures nothing itself and knows no request."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from flexjax.layout import SlotLayout
from flexjax.scheduler.output import Iteration

GUESSED_SECONDS_PER_SLOT = 1e-5
GUESSED_UPDATE_SECONDS = 1e-3
"""Stand in until something was measured; the first observations replace them."""

SMALLEST_SECONDS = 1e-9
SMALLEST_SPREAD = 0.02
SPREAD_RATE = 0.1
PATIENCE = 100
DRIFT = 0.01
"""An entry that was not used in so many observations goes this share of the way back to its calibrated value with
every further one."""


@dataclass(frozen=True)
class PredictionError:
    """Relative error |predicted - real| / real of the last iterations: median, 99th percentile, how many."""

    p50: float
    p99: float
    count: int


class LatencyModel:
    """Seconds of an iteration as a sum over the programs it runs.

    ``seconds = overhead + forward[layout] + slope[layout] * context_tokens + sum(count * unit[program])``

    The table has one entry per compiled program: ("forward", layout), ("loss", window), ("backward", window),
    ("update",). Shapes are static, so the same program takes the same time but for attention, whose cost grows with
    the K/V positions that decode slots and tiles read. A layout has its own slope, because what a position costs
    depends on how many queries read it together.

    ``calibrate`` fits the table from measurements made at the start: a layout's entry and slope are the least-squares
    line through its measurements, and the slope of a layout that was not measured is that of the nearest in size.

    ``observe`` corrects the table from each real iteration by normalised least mean squares (Haykin, Adaptive
    Filter Theory, chapter 6) in relative coordinates: with ``x`` the predicted part of a program and ``e`` the error,
    its entry is multiplied by ``1 + rate * e * x / sum(x**2)``. An error counts at most three times the
    running mean relative error, so one hiccup moves little and a lasting change is followed within a few iterations.
    An error is never below minus the prediction, so with ``rate`` at most 0.4 and few programs no entry turns negative.

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
        self.slopes: dict[SlotLayout, float] = {}
        self.programs: dict[tuple, float] = {}
        self._calibrated: dict[tuple, float] = {}
        self._unused: dict[tuple, int] = {}
        self._samples: dict[tuple, list[tuple[int, float]]] = {}
        self._spread = 1.0
        self._errors: deque[float] = deque(maxlen=1024)

    def calibrate(self, key: tuple, seconds: float, context_tokens: int = 0) -> None:
        """Takes a measurement of one program alone; several of the same program are averaged.

        Args:
            key: ("forward", SlotLayout), ("loss", window), ("backward", window) or ("update",).
            context_tokens: as in ``Iteration``; two different ones of a layout determine its slope.
        """
        if seconds <= 0:
            raise ValueError(f"program {key} was measured at {seconds} seconds; it must be more than 0")
        samples = self._samples.setdefault(key, [])
        samples.append((context_tokens, seconds))
        slope = slope_of(samples)
        if key[0] == "forward":
            self.slopes[key[1]] = slope
        mean = fmean(sample[1] for sample in samples) - slope * fmean(sample[0] for sample in samples)
        self.programs[key] = self._calibrated[key] = max(mean, SMALLEST_SECONDS)

    def predict(self, layout: SlotLayout | None, context_tokens: int, units: Mapping[tuple, int]) -> float:
        """Seconds of an iteration with one forward step (or none) and ``units[program]`` calls of each program."""
        return self.overhead + sum(self._parts(layout, context_tokens, units).values())

    def forward_seconds(self, layout: SlotLayout, context_tokens: int) -> float:
        """Seconds of a forward step alone."""
        return self.program_seconds(("forward", layout)) + self.slope_seconds(layout) * context_tokens

    def slope_seconds(self, layout: SlotLayout) -> float:
        """Seconds per context token of a forward step."""
        known = self.slopes.get(layout)
        if known is None and self.slopes:
            known = self.slopes[min(self.slopes, key=lambda other: abs(other.slots - layout.slots))]
        return known or 0.0

    def program_seconds(self, key: tuple) -> float:
        """Seconds of one call without context: from the table, else from measured programs of the same kind."""
        known = self.programs.get(key)
        return known if known is not None else self._inferred(key)

    def observe(self, iteration: Iteration, seconds: float) -> None:
        """Corrects the table with what an iteration really took."""
        self._errors.append(abs(iteration.predicted - seconds) / max(seconds, SMALLEST_SECONDS))
        parts = self._parts(iteration.layout, iteration.context_tokens, iteration.programs)
        predicted = sum(parts.values())
        self._drift(parts)
        squares = sum(part * part for part in parts.values())
        if not squares:
            return
        error = max(seconds - self.overhead - predicted, -predicted)
        bound = 3 * self._spread * predicted
        self._spread += SPREAD_RATE * (min(abs(error) / predicted, 1.0) - self._spread)
        self._spread = max(self._spread, SMALLEST_SPREAD)
        error = min(max(error, -bound), bound)
        for key, part in parts.items():
            self._scale(key, 1 + self.rate * error * part / squares)

    def _drift(self, used: Mapping[tuple, float]) -> None:
        """Move entries that are not used towards their calibrated values: one that a hiccup has raised above every
        limit would otherwise never be tried, and so never corrected."""
        for key, calibrated in self._calibrated.items():
            self._unused[key] = 0 if key in used else self._unused.get(key, 0) + 1
            if self._unused[key] > PATIENCE:
                self.programs[key] *= (calibrated / self.programs[key]) ** DRIFT

    def errors(self) -> PredictionError:
        """How well recent iterations were predicted when they were planned."""
        ranked = sorted(self._errors)
        if not ranked:
            return PredictionError(0.0, 0.0, 0)
        return PredictionError(ranked[len(ranked) // 2], ranked[int(0.99 * (len(ranked) - 1))], len(ranked))

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        programs = [[encode_key(key), seconds] for key, seconds in self.programs.items()]
        slopes = [[asdict(layout), slope] for layout, slope in self.slopes.items()]
        content = {"overhead": self.overhead, "rate": self.rate, "slopes": slopes, "programs": programs}
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
            model.slopes = {SlotLayout(**layout): float(slope) for layout, slope in content["slopes"]}
            model.programs = {decode_key(key): float(seconds) for key, seconds in content["programs"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a latency table ({error}); delete it to measure again") from error
        return model

    def _parts(self, layout: SlotLayout | None, context_tokens: int, units: Mapping[tuple, int]) -> dict[tuple, float]:
        parts = {key: count * self.program_seconds(key) for key, count in units.items()}
        if layout is not None:
            parts["forward", layout] = self.program_seconds(("forward", layout))
            parts["context", layout] = self.slope_seconds(layout) * context_tokens
        return parts

    def _scale(self, key: tuple, factor: float) -> None:
        if key[0] == "context":
            self.slopes[key[1]] = self.slope_seconds(key[1]) * factor
        else:
            self.programs[key] = max(self.program_seconds(key) * factor, SMALLEST_SECONDS)

    def _inferred(self, key: tuple) -> float:
        if key == ("update",):
            return GUESSED_UPDATE_SECONDS
        if key[0] == "forward":
            points = {name[1].slots: seconds for name, seconds in self.programs.items() if name[0] == "forward"}
            return interpolate(points, key[1].slots)
        points = {name[1]: seconds for name, seconds in self.programs.items() if name[0] == key[0]}
        return interpolate(points, key[1])


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


def slope_of(samples: list[tuple[int, float]]) -> float:
    """Least-squares seconds per context token of (context tokens, seconds); at least 0, and 0 if it is not known."""
    mean_context = fmean(context for context, _ in samples)
    mean_seconds = fmean(seconds for _, seconds in samples)
    product = sum((context - mean_context) * (seconds - mean_seconds) for context, seconds in samples)
    square = sum((context - mean_context) ** 2 for context, _ in samples)
    return max(product / square, 0.0) if square else 0.0


def encode_key(key: tuple) -> list:
    return [asdict(part) if isinstance(part, SlotLayout) else part for part in key]


def decode_key(parts: list) -> tuple:
    return tuple(SlotLayout(**part) if isinstance(part, dict) else part for part in parts)
