"""MemoryPlan: every resident byte, before anything is allocated; decides how many pages there are."""

import math
from dataclasses import dataclass, replace

import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS
from flexjax.models.lora import MODULES
from flexjax.state import Dimensions, adapter_shapes, gradient_shapes, nbytes, resident_bytes, row_shapes

RESERVE = 0.02
"""Share of the limit left to the runtime and to allocation granularity, at least."""

GUARD = 2 * 8 * 2**20
"""Bytes that XLA puts around each array with which it measures a way to compute a product, to see whether it writes
beside it."""

WORKSPACE = 32 * 2**20
"""Bytes that cuBLASLt may work in."""


class OutOfMemory(ValueError):
    """Something cannot fit; names the number and the setting that changes it."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, on one device.

    Attributes:
        limit: bytes the engine may use.
        fixed: (purpose, bytes) of all that is not pages.
        page_bytes: bytes of one page in all layers.
        pages: pages in the pool.
    """

    limit: int
    fixed: tuple[tuple[str, int], ...]
    page_bytes: int
    pages: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self.fixed) + self.pages * self.page_bytes

    @property
    def affordable(self) -> int:
        """Pages that would fit, wanted or not."""
        return self.pages + (self.limit - self.total) // self.page_bytes

    def rows(self) -> list[tuple[str, int]]:
        """(purpose, bytes) as a table prints them."""
        pool = (f"pages ({self.pages} of {PAGE_TOKENS} tokens)", self.pages * self.page_bytes)
        return [*self.fixed, pool, ("free", self.limit - self.total)]

    def __str__(self) -> str:
        lines = [f"{purpose:<40} {size / 2**20:>12,.1f} MiB" for purpose, size in self.rows()]
        return "\n".join([*lines, f"{'limit':<40} {self.limit / 2**20:>12,.1f} MiB"])


def pages_wanted(dims: Dimensions, jobs: int) -> int:
    """Pages with which neither full rows nor full microbatches ever wait, and half as many again to keep prefixes."""
    blocks = dims.microbatch // PAGE_TOKENS
    busy = dims.max_rows * dims.context_pages + jobs * dims.microbatch_pages(blocks)
    return math.ceil(1.5 * busy)


def measuring_bytes(dims: Dimensions) -> int:
    """What XLA takes of a GPU while it measures ways to compute the largest product, that of all rows and the head:
    both operands, two results, for it compares every way's with the first one's, and what a way works in."""
    rows, hidden, vocabulary = dims.max_rows, dims.model.hidden_size, dims.model.vocab_size // dims.tp
    operands = (rows + vocabulary) * hidden * jnp.dtype(dims.dtype).itemsize
    results = 2 * rows * vocabulary * jnp.dtype(jnp.float32).itemsize
    return operands + results + WORKSPACE + 5 * GUARD


def plan_memory(
    dims: Dimensions,
    *,
    weights: int,
    temporaries: int,
    limit: int,
    jobs: int,
    pages: int | None = None,
    measuring: int = 0,
) -> MemoryPlan:
    """Decide the number of pages.

    Args:
        dims: its ``pages`` is not read.
        weights: bytes of the base model on this device.
        temporaries: bytes of the largest compiled program's temporaries.
        limit: bytes the engine may use on this device.
        jobs: finetuning jobs that run at once. Each trains in a range of the flat rank axis, so that all of them
            together have no more columns than that.
        pages: the user's own number; None takes what there is, up to `pages_wanted`.
        measuring: bytes that the compiler takes while it measures ways to compute something (`measuring_bytes`).

    Raises:
        OutOfMemory: not even one longest sequence fits.
    """
    gradients = gradient_shapes(dims, dims.rank_capacity, MODULES)
    accumulators = nbytes((gradients.hidden, gradients.d_k, gradients.d_v))
    factors = nbytes(adapter_shapes(dims, dims.rank_capacity, MODULES, "float32"))
    fixed = (
        ("weights", weights),
        ("resident adapters", resident_bytes(dims)),
        ("row state", nbytes(row_shapes(dims))),
        ("adapter masters, moments and gradients", 4 * factors),
        (f"accumulators of backward passes ({jobs} jobs)", jobs * accumulators),
        ("temporaries of the largest program", temporaries),
        ("reserve", max(int(limit * RESERVE), measuring)),
    )
    page_bytes = dims.page_bytes // dims.tp
    left = limit - sum(size for _, size in fixed)
    affordable = max(left // page_bytes, 0)
    needed = dims.context_pages
    chosen = min(affordable, pages_wanted(dims, jobs)) if pages is None else pages
    if chosen > affordable or chosen < needed:
        raise OutOfMemory(
            f"{max(chosen, needed)} pages of {page_bytes:,} bytes are needed (one sequence of max_model_len = "
            f"{dims.context} takes {needed}), but {affordable} fit into {limit:,} bytes after "
            f"{limit - left:,} bytes for everything else; lower max_model_len, pages or "
            "adapter_rank_capacity, or raise memory_bytes or memory_fraction"
        )
    return MemoryPlan(limit, fixed, page_bytes, int(chosen))


def with_pages(dims: Dimensions, plan: MemoryPlan) -> Dimensions:
    return replace(dims, pages=plan.pages)
