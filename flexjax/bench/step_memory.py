"""MemoryWatch: device memory that finetuning takes above the weights.

What is counted:
    pages       those in use at the same time, at most: keys and values, final hidden states and the tape. The rest of
                the pool is the engine's to give to others.
    adapter     resident copies that requests could use, float32 master, optimizer state, gradient sums
    cotangents  of the hidden states, keys and values of a microbatch
    rows        state of the rows of the running batch
    temporaries of the largest program that ran, as the compiler reports them
"""

import jax

from flexjax.engine.engine import Engine
from flexjax.state import nbytes, resident_bytes


class MemoryWatch:
    """Args:
        job: name of the finetuning job.

    Attributes:
        pages: most that were in use at once.
        parts: bytes by purpose, after `count_arrays`.
        in_use: most bytes that the runtime reported, the unused pages and the weights left out; None without a GPU.
    """

    def __init__(self, engine: Engine, job: str):
        self.pages, self.parts, self.in_use = 0, {}, None
        self._engine, self._job = engine, job
        self._microbatches: dict[int, int] = {}
        runner = engine.loop.runner
        self._page_bytes = nbytes(runner.pool) // runner.programs.dims.pages
        self._others = nbytes(runner.weights) + nbytes(runner.pool)

    def look(self) -> None:
        """How things stand; from any thread."""
        statistics = self._engine.scheduler.statistics
        self.pages = max(self.pages, statistics.pages - statistics.free_pages)
        training = list(self._engine.trainer.training.items())
        self._microbatches |= {number: each.packed.tokens for number, each in training}
        in_use = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
        if in_use is not None:
            self.in_use = max(self.in_use or 0, in_use - self._others + self.pages * self._page_bytes)

    @property
    def microbatch_tokens(self) -> float:
        """Mean number of useful tokens in a microbatch."""
        return sum(self._microbatches.values()) / len(self._microbatches)

    @property
    def bytes(self) -> int:
        """The sum of the parts; or what the runtime reported, if that is more."""
        return max(sum(self.parts.values()), self.in_use or 0)

    def count_arrays(self) -> None:
        """Note the bytes of everything that is not pages."""
        runner = self._engine.loop.runner
        job, gradients = runner.jobs[self._job], runner.jobs[self._job].gradients
        self.parts = {
            "pages": self.pages * self._page_bytes,
            "adapter": resident_bytes(runner.programs.dims) + nbytes((job.master, gradients.a, gradients.b)),
            "cotangents": nbytes((gradients.hidden, gradients.d_k, gradients.d_v)),
            "rows": nbytes(runner.rows),
            "temporaries": max(each.memory.temp_size_in_bytes for each in self._programs()),
        }

    def _programs(self) -> list:
        """Those that finetuning alone runs."""
        compiled = self._engine.loop.runner.programs.compiled
        return [each for key, each in compiled.items() if key[0] != "forward" or key[1].tape]
