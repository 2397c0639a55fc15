"""PoolWatch: who holds the pages of the pool, over time, and what the rest of the memory is for."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flexjax.engine.engine import Engine
from flexjax.engine.loop import EngineStopped

PERIOD = 0.5
"""Seconds between two looks, each between two iterations of the engine."""


@dataclass(frozen=True)
class PoolSample:
    """Attributes:
    at: seconds on the engine's clock.
    requests, finetuning, free: pages; those that the device still uses for either count as the requests'.
    running, waiting: requests.
    """

    at: float
    requests: int
    finetuning: int
    free: int
    running: int
    waiting: int


class PoolWatch:
    """Looks at the pool in a thread of its own while it is entered.

    Attributes:
        samples: so far.
    """

    def __init__(self, engine: Engine):
        self.samples: list[PoolSample] = []
        self._engine, self._done = engine, threading.Event()
        self._thread = threading.Thread(target=self._look_until_done, name="flexjax-pool", daemon=True)

    def __enter__(self) -> "PoolWatch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _look_until_done(self) -> None:
        try:
            self.samples.append(self._engine.loop.call(self._look))
            while not self._done.wait(PERIOD):
                self.samples.append(self._engine.loop.call(self._look))
        except EngineStopped:
            return  # whoever waits for its requests is told why

    def _look(self) -> PoolSample:
        """On the engine's thread."""
        found, now = self._engine.scheduler.statistics, self._engine.loop.clock()
        held = found.pages - found.available_pages - found.tape_pages
        return PoolSample(now, held, found.tape_pages, found.available_pages, found.running, found.waiting)


def memory_metrics(engine: Engine, samples: Sequence[PoolSample]) -> dict[str, float]:
    """Memory by kind, in units of 10^6 bytes: ``memory_mb_<kind>``; of the pages, mean and most over the samples."""
    plan = engine.memory_plan
    fixed = {f"memory_mb_{name_of(purpose)}": size / 1e6 for purpose, size in plan.fixed}
    pages = {"memory_mb_pool": plan.pages * plan.page_bytes / 1e6}
    for kind in ("requests", "finetuning", "free"):
        counts = [getattr(sample, kind) for sample in samples]
        pages[f"memory_mb_{kind}_mean"] = fmean(counts) * plan.page_bytes / 1e6
        pages[f"memory_mb_{kind}_most"] = max(counts) * plan.page_bytes / 1e6
    return fixed | pages


def name_of(purpose: str) -> str:
    """``accumulators of backward passes (2 jobs)`` as ``accumulators_of_backward_passes``."""
    return "_".join(re.findall("[a-z]+", purpose.split("(")[0].lower()))
