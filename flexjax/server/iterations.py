"""EngineGauge: what the service's metrics say of the engine, summed over iterations as they go by."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import flexjax
from flexjax.engine.metrics import IterationRecord
from flexjax.scheduler.scheduler import Statistics
from flexjax.server.histogram import Histogram

TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Of iterations; vLLM's, so that one dashboard reads both."""

RECENT_SECONDS = 10.0
"""Of the engine's time, that shares and means look back."""


@dataclass(frozen=True)
class IterationTotals:
    """Sums over iterations.

    Attributes:
        seconds: by what they were spent on.
        finetune_tokens: that went through a forward step.
    """

    iterations: int = 0
    finetune_tokens: int = 0
    backward_units: int = 0
    updates: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "prompt": 0.0, "finetune": 0.0})

    def plus(self, record: IterationRecord) -> "IterationTotals":
        parts = zip(self.seconds.items(), record.split, strict=True)
        return replace(
            self,
            iterations=self.iterations + 1,
            finetune_tokens=self.finetune_tokens + record.finetune_slots,
            backward_units=self.backward_units + record.backward_units,
            updates=self.updates + record.updates,
            seconds={part: before + new for (part, before), new in parts},
        )


@dataclass(frozen=True)
class EngineFacts:
    """Attributes:
    finetune_share: of the time of the newest iterations, 0 .. 1.
    headroom_seconds: mean over them of what they left of their limit; None if none had one.
    adapter_versions: number of the version that each name serves.
    tokens: of requests, that iterations computed for them.
    """

    statistics: Statistics
    totals: IterationTotals
    finetune_share: float
    headroom_seconds: float | None
    adapter_versions: dict[str, int]
    tokens: Histogram


class EngineGauge:
    """Remembers which iterations it has counted."""

    def __init__(self):
        self._totals, self._counted = IterationTotals(), -1
        self._tokens = Histogram(TOKEN_BOUNDS)

    def gather(self, engine: "flexjax.Engine") -> EngineFacts:
        """On the engine's thread."""
        records = engine.loop.records
        for record in newest(records, lambda each: each.index > self._counted):
            self._totals = self._totals.plus(record)
            self._counted = record.index
            if tokens := record.decode_slots + record.prompt_slots:
                self._tokens.observe(tokens)
        since = records[-1].end - RECENT_SECONDS if records else 0.0
        recent = newest(records, lambda each: each.start >= since)
        seconds, rooms = sum(each.seconds for each in recent), [e.limit - e.seconds for e in recent if e.limit]
        return EngineFacts(
            statistics=engine.scheduler.statistics,
            totals=self._totals,
            finetune_share=sum(each.split[2] for each in recent) / seconds if seconds else 0.0,
            headroom_seconds=sum(rooms) / len(rooms) if rooms else None,
            adapter_versions={name: each.version for name, each in engine.adapters.named.items()},
            tokens=self._tokens,
        )


def newest(records: Iterable[IterationRecord], wanted) -> list[IterationRecord]:
    """The records at the end for which ``wanted`` holds, oldest first."""
    found = []
    for record in reversed(records):
        if not wanted(record):
            break
        found.append(record)
    return found[::-1]
