"""The metrics of a co-serving run, from what its requests felt, what its iterations did and which microbatches ended.

Plain numbers in and out. Times are seconds on one clock on the way in, milliseconds in the metrics' names.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from flexjax.bench.percentiles import PERCENTILES, percentile, percentiles
from flexjax.engine.metrics import IterationRecord, SettledMicrobatch


@dataclass(frozen=True)
class Felt:
    """What a request asked and got.

    Attributes:
        due: when it should have arrived.
        asked: output tokens.
        times: when each token came.
        ended: it ended by itself, neither refused nor given up.
    """

    due: float
    asked: int
    times: tuple[float, ...]
    ended: bool

    @property
    def whole(self) -> bool:
        """Every token came."""
        return self.ended and len(self.times) == self.asked

    @property
    def ttft(self) -> float:
        """Infinite without a token."""
        return self.times[0] - self.due if self.times else math.inf

    @property
    def gaps(self) -> list[float]:
        """Between a token and the next."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def tpot(self) -> float | None:
        """Mean gap; infinite if tokens are missing, None for an answer of one token."""
        if not self.whole:
            return math.inf
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None


@dataclass(frozen=True)
class Objective:
    """What a request must feel to be content: a time to first token below ``ttft`` and, by kind,

    tpot    a mean time per later token below ``per_token``
    itl     99 of 100 of its gaps between tokens below ``per_token``
    """

    kind: Literal["tpot", "itl"]
    per_token: float
    ttft: float

    def attained(self, felt: Felt) -> bool:
        return felt.whole and felt.ttft < self.ttft and (self.pace(felt) or 0.0) < self.per_token

    def pace(self, felt: Felt) -> float | None:
        """The figure that ``per_token`` bounds; None for an answer of one token."""
        if self.kind == "tpot":
            return felt.tpot
        return percentile(felt.gaps, 99)

    def held(self, metrics: Mapping[str, float]) -> bool:
        """For the run as a whole: 99 of 100 requests are content or, by kind itl, the 99th percentiles over all gaps
        and all requests are below the limits."""
        if self.kind == "tpot":
            return metrics["attainment"] >= 0.99
        return metrics["itl_ms_p99"] < 1e3 * self.per_token and metrics["ttft_ms_p99"] < 1e3 * self.ttft


def attainment(requests: Sequence[Felt], objective: Objective) -> float:
    """Share of the requests that are content; one that was refused or is unfinished is not."""
    return sum(map(objective.attained, requests)) / len(requests)


def request_metrics(requests: Sequence[Felt], objective: Objective) -> dict[str, float]:
    """Over every request of a trace. Where a token never came, a time is infinite."""
    gaps = [gap for felt in requests for gap in felt.gaps]
    found = {
        **milliseconds("ttft", (felt.ttft for felt in requests)),
        **milliseconds("tpot", (felt.tpot for felt in requests)),
        **milliseconds("itl", gaps),
        "max_gap_ms_p99": milliseconds("gap", (max(felt.gaps) for felt in requests if felt.gaps))["gap_ms_p99"],
        "attainment": attainment(requests, objective),
        "requests": len(requests),
        "unfinished": sum(not felt.whole for felt in requests),
    }
    return found | {"objective_held": float(objective.held(found))}


def milliseconds(name: str, seconds: Iterable[float | None]) -> dict[str, float]:
    """{"<name>_ms_p50": ...}; all infinite where no value is known."""
    found = percentiles(seconds) or dict.fromkeys((f"p{percent}" for percent in PERCENTILES), math.inf)
    return {f"{name}_ms_{percent}": 1e3 * value for percent, value in found.items()}


def output_rate(requests: Iterable[Felt], start: float, end: float) -> float:
    """Output tokens per second that came in a span of time."""
    return sum(start <= at <= end for felt in requests for at in felt.times) / (end - start)


@dataclass(frozen=True)
class Useful:
    """Useful tokens of one microbatch: those that went through the model, padding left out, each once.

    Attributes:
        at: when its backward pass ended; before that they do not count.
        trained: those that have a loss.
        lean: its tape kept less, for want of pages.
    """

    at: float
    tokens: int
    trained: int
    lean: bool = False
    job: str = ""


def useful_tokens(settled: Iterable[SettledMicrobatch], ends: Mapping[int, float]) -> list[Useful]:
    """With ``ends``, the time at which each iteration ended, by its index. One that is not known yet is left out."""
    known = [each for each in settled if each.iteration in ends]
    of = lambda each: (each.tokens, each.trained_tokens, each.lean, each.job)
    return [Useful(ends[each.iteration], *of(each)) for each in known]


def finetune_metrics(useful: Sequence[Useful], start: float, end: float) -> dict[str, float]:
    """Rates of what ended in a span of time, and the share of it that had lean tapes."""
    counted = [each for each in useful if start < each.at <= end]
    tokens = sum(each.tokens for each in counted)
    return {
        "finetune_lean_share": sum(each.tokens for each in counted if each.lean) / tokens if tokens else 0.0,
        "finetune_tokens_per_s": tokens / (end - start),
        "finetune_loss_tokens_per_s": sum(each.trained for each in counted) / (end - start),
    }


def job_metrics(useful: Sequence[Useful], names: Iterable[str], start: float, end: float) -> dict[str, float]:
    """Of each job, the tokens per second that `finetune_metrics` has of all."""
    rate = lambda name: finetune_metrics([each for each in useful if each.job == name], start, end)
    return {f"finetune_tokens_per_s_{name}": rate(name)["finetune_tokens_per_s"] for name in names}


def steady_finetune_metrics(useful: Sequence[Useful]) -> dict[str, float]:
    """Rates from the end of the first microbatch to that of the last, so that none counts in part.

    Raises:
        RuntimeError: fewer than two ended.
    """
    if len(useful) < 2:
        raise RuntimeError(f"{len(useful)} microbatches ended while measured; alone_seconds of [bench] allows more")
    return finetune_metrics(useful, useful[0].at, useful[-1].at)


def prediction_metrics(records: Iterable[IterationRecord]) -> dict[str, float]:
    """|predicted - real| / real over the iterations that were foretold; nothing without one."""
    foretold = [each for each in records if each.predicted is not None and each.seconds > 0]
    found = percentiles(abs(each.predicted - each.seconds) / each.seconds for each in foretold)
    return {} if found is None else {f"prediction_error_{name}": found[name] for name in ("p50", "p99")}
