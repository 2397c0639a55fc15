"""Trace: when the requests of a workload arrive and how long they are; read, cut, thinned, squeezed, or made of
arrivals and lengths that were recorded apart."""

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexjax.fields import ConfigError

RATE_OR_DURATION = re.compile(r"_(r\d+(\.\d+)?|\d+s)(?=_|$)")


@dataclass(frozen=True)
class TraceRow:
    """Attributes:
    index: place in the file, whatever was left out since.
    due: seconds from the beginning; prompt, output: tokens.
    """

    index: int
    due: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Trace:
    """Attributes:
    name: of the file, with what was done to it.
    shape: the name without rate and duration: traces of one shape differ in nothing else.
    rows: at least one, in the order of arrival.
    """

    name: str
    shape: str
    rows: tuple[TraceRow, ...]

    @property
    def seconds(self) -> float:
        """Until the last arrival."""
        return self.rows[-1].due

    @property
    def rate(self) -> float:
        """Requests per second, on average."""
        return len(self.rows) / self.seconds

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(row.prompt + row.output for row in self.rows)

    def between(self, start: float, end: float) -> tuple[TraceRow, ...]:
        """Requests that arrive in a span of time."""
        return tuple(row for row in self.rows if start <= row.due <= end)

    def first(self, seconds: float) -> "Trace":
        """Its beginning. Raises ConfigError if nothing arrives in it."""
        rows = self.between(0.0, seconds)
        if not rows or not rows[-1].due:
            raise ConfigError(f"nothing arrives in the first {seconds:g} seconds of {self.name}; raise seconds")
        return replace(self, name=f"{self.name}_first{seconds:g}s", rows=rows)

    def without_every(self, count: int) -> "Trace":
        """Every ``count``-th row left out, the first ``count - 1`` kept."""
        rows = tuple(row for row in self.rows if (row.index + 1) % count)
        return replace(self, name=f"{self.name}_without_every_{count}th", rows=rows)

    def at_rate(self, rate: float) -> "Trace":
        """The same requests, arriving faster or slower by one factor."""
        factor = self.rate / rate
        return replace(self, rows=tuple(replace(row, due=row.due * factor) for row in self.rows))

    def lasting(self, seconds: float) -> "Trace":
        """Its beginning, one request at least, or, if it is shorter, itself again and again, with a mean gap between
        an end and a beginning."""
        count, period = len(self.rows), self.seconds + 1 / self.rate
        rounds = math.ceil(seconds / period)
        again = lambda row, n: replace(row, index=row.index + n * count, due=row.due + n * period)
        rows = (again(row, number) for number in range(rounds) for row in self.rows)
        return replace(self, rows=tuple(row for row in rows if row.due <= seconds) or self.rows[:1])


def shape_of(name: str) -> str:
    """``burst_sharegpt_r20_240s`` is of the shape ``burst_sharegpt``."""
    return RATE_OR_DURATION.sub("", name)


def read_trace(path: Path) -> Trace:
    """A file of ``{"t": seconds, "p": prompt tokens, "o": output tokens}``, a row a line.

    Raises:
        ConfigError: a line is no such row, or there is none.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            found.append(parse_row(line, f"{path}, line {number}"))
    if not found:
        raise ConfigError(f"{path} holds no requests")
    rows = (TraceRow(index, *row) for index, row in enumerate(sorted(found, key=lambda row: row[0])))
    return Trace(path.stem, shape_of(path.stem), tuple(rows))


def parse_row(line: str, where: str) -> tuple[float, int, int]:
    try:
        row = json.loads(line)
        due, prompt, output = float(row["t"]), int(row["p"]), int(row["o"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: {error!r}; a row is {{"t": seconds, "p": tokens, "o": tokens}}') from error
    if not 0 <= due < float("inf") or prompt < 1 or output < 1:
        raise ConfigError(f"{where}: t is {due}, p {prompt} and o {output}; t is at least 0, p and o at least 1")
    return due, prompt, output


def recorded_trace(name: str, arrivals: Path, lengths: Path, start: float, seconds: float, rate: float) -> Trace:
    """Recorded arrivals with recorded lengths.

    The first ``rate * seconds`` arrivals from ``start`` on are squeezed, or stretched, into ``seconds``; so bursts keep
    their shape. Arrivals in whole seconds are spread over their second. Lengths are drawn in random order, all of them
    before any comes again.

    Args:
        arrivals: a time in seconds a line, ascending.
        lengths: CSV with the columns prompt_tokens and response_tokens.

    Raises:
        ConfigError: there are too few arrivals after ``start``.
    """
    random, count = np.random.default_rng(0), round(rate * seconds)
    times = np.array(arrivals.read_text().split(), float)
    times = np.sort(times + random.uniform(0, 1, len(times)))
    times = times[times >= start][:count] - start
    if count < 2 or len(times) < count:
        raise ConfigError(
            f"{rate:g} requests/s for {seconds:g} s are {count} arrivals; {arrivals} has {len(times)} from {start:g} s "
            "on: lower rate, seconds or start, and ask for two at least"
        )
    drawn = shuffled(read_lengths(lengths), count, random)
    rows = zip((times * seconds / times[-1]).tolist(), drawn, strict=True)
    return Trace(name, shape_of(name), tuple(TraceRow(index, due, *pair) for index, (due, pair) in enumerate(rows)))


def read_lengths(path: Path) -> list[tuple[int, int]]:
    with path.open(newline="") as file:
        return [(int(row["prompt_tokens"]), int(row["response_tokens"])) for row in csv.DictReader(file)]


def shuffled(items: Sequence, count: int, random: np.random.Generator) -> list:
    rounds = -(-count // len(items))
    order = np.concatenate([random.permutation(len(items)) for _ in range(rounds)])
    return [items[place] for place in order[:count]]
