"""Scrape: what /metrics asks the engine, and what it said last, for when it does not answer in time."""

import asyncio
import time
from dataclasses import dataclass

import flexjax
from flexjax.server.adapter_metrics import AdapterFacts
from flexjax.server.errors import ApiError
from flexjax.server.iterations import EngineFacts, EngineGauge
from flexjax.server.patience import answer_of

PATIENCE = 2.0
"""Seconds that a scrape waits; Prometheus gives up after ten."""


@dataclass(frozen=True)
class Scraped:
    """Gathered between the same two iterations.

    Attributes:
        moment: on the clock of `time.perf_counter`.
    """

    engine: EngineFacts
    adapters: AdapterFacts
    moment: float

    @property
    def age(self) -> float:
        """Seconds since."""
        return time.perf_counter() - self.moment


class Scrape:
    """On the event loop. However many ask, the engine is asked once at a time."""

    def __init__(self, engine: "flexjax.Engine"):
        self._engine, self._gauge = engine, EngineGauge()
        self._known: Scraped | None = None
        self._asking: asyncio.Future | None = None

    async def look(self) -> Scraped | None:
        """What the engine says now, or said last; None if it never said anything. Raises EngineStopped."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.wrap_future(self._engine.loop.post(self._gather))
        try:
            self._known = await answer_of(self._asking, PATIENCE)
        except ApiError:  # it is busy
            return self._known
        return self._known

    def _gather(self) -> Scraped:
        """On the engine's thread."""
        facts = self._gauge.gather(self._engine)
        return Scraped(facts, AdapterFacts.gather(self._engine), time.perf_counter())
