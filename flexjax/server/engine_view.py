"""EngineView: what the dashboard shows of the engine. Its thread hands over a few numbers and the records that are new;
everything else is worked out elsewhere."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import flexjax
from flexjax.engine.metrics import IterationRecord
from flexjax.scheduler.scheduler import Statistics
from flexjax.server.patience import answer_of
from flexjax.server.recent import Seconds

PARTS = ("decode", "prompt", "forward", "backward")
SHOWN_ITERATIONS = 100
MOST_RECORDS = 6_000
"""At once, so that whoever looks after a long time does not hold up the engine: a minute of iterations of 10 ms."""

PATIENCE = 5.0
"""Seconds in which the engine has to answer."""

FRESH_SECONDS = 0.5
"""However many look, the engine is asked no more often."""


@dataclass(frozen=True)
class EngineNow:
    """Attributes:
    records: since the last time, the oldest first.
    unstarted: requests whose adapter is not on the device yet; the scheduler does not know them.
    resident: names of adapters on the device, those that jobs train among them, as the engine has them.
    """

    statistics: Statistics
    records: tuple[IterationRecord, ...]
    unstarted: int
    places: int
    resident: tuple[str, ...]
    host_bytes: int

    @classmethod
    def gather(cls, engine: "flexjax.Engine", counted: int) -> "EngineNow":
        """On the engine's thread.

        Args:
            counted: index of the newest record that is known.
        """
        records, tier = engine.loop.records, engine.library.tier
        new = min(records[-1].index - counted, MOST_RECORDS) if records else 0
        return cls(
            statistics=engine.scheduler.statistics,
            records=tuple(islice(reversed(records), new))[::-1],
            unstarted=tier.waiting,
            places=tier.table.adapters - 1,
            resident=tuple(version.name for version in tier.table.resident.values()),
            host_bytes=engine.library.host.bytes,
        )


@dataclass
class Spent:
    """Attributes:
    finetune_tokens: that went forward.
    seconds: of iterations that ended, by PARTS.
    """

    finetune_tokens: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))


class EngineView:
    """On the event loop."""

    def __init__(self, engine: "flexjax.Engine"):
        self._engine, self._counted = engine, -1
        self._spent = Seconds(Spent)
        self._newest: list[IterationRecord] = []
        self._asked, self._asking = 0.0, None

    async def look(self) -> EngineNow:
        """Raises EngineStopped, or ApiError (503) if the engine does not answer."""
        if self._asking is None or self._asking.done() and time.perf_counter() > self._asked + FRESH_SECONDS:
            self._asked = time.perf_counter()
            self._asking = asyncio.ensure_future(self._ask())
        return await answer_of(self._asking, PATIENCE)

    async def _ask(self) -> EngineNow:
        now = await asyncio.wrap_future(self._engine.loop.post(EngineNow.gather, self._engine, self._counted))
        self.take(now.records)
        return now

    def take(self, records: Sequence[IterationRecord]) -> None:
        """New ones, the oldest first."""
        for record in records:
            slot = self._spent.at(self._engine.loop.started + record.end)
            slot.finetune_tokens += record.finetune_slots
            slot.seconds = [before + new for before, new in zip(slot.seconds, record.parts, strict=True)]
            self._counted = record.index
        self._newest = [*self._newest, *records][-SHOWN_ITERATIONS:]

    def spent(self, now: float) -> dict[str, list[float]]:
        """Finetuning tokens and shares of time, of each of the newest seconds.

        Args:
            now: seconds on the clock of `time.perf_counter`.
        """
        slots = [slot or Spent() for slot in self._spent.whole(now)]
        shares = {part: [round(slot.seconds[place], 4) for slot in slots] for place, part in enumerate(PARTS)}
        return {"finetune_tokens": [slot.finetune_tokens for slot in slots], **shares}

    def iterations(self) -> list[dict[str, Any]]:
        """The newest ones, the oldest first, in milliseconds."""
        milliseconds = lambda seconds: None if seconds is None else round(1e3 * seconds, 3)
        return [
            {
                "index": record.index,
                **dict(zip(PARTS, map(milliseconds, record.parts), strict=True)),
                "limit": milliseconds(record.limit),
                "backward_units": record.backward_units,
            }
            for record in self._newest
        ]
