"""How the decode kernel cuts its work. Sizes are data; the reasons stand beside them."""

from dataclasses import dataclass

import jax

KEYS = 64
"""Keys in a block: one page, so that a block is one box of K and one of V."""

ROWS = 64
"""Rows of the smallest tensor-core product. A group has fewer heads; what the rows beyond it hold is never written."""

GROUP = 8
"""Query heads of a group in buffers between the kernels (16 and 32 bytes are what bulk copies move)."""

LOWEST = -1e30
"""Stands for a score of minus infinity; finite, so that the difference of two of them is not NaN."""

MULTIPROCESSORS = 132
"""Of an H100 or H200, where no device can be asked."""

INTERPRETED_MULTIPROCESSORS = 3
"""Enough in the interpreter for contexts to be split between thread blocks."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of one thread block.

    Attributes:
        streams: pairs of a loading and a computing warpgroup; each pair works alone, on its own share of the blocks.
        stages: blocks of K and V in flight, per stream.
        loading_registers, computing_registers: of a thread; 128 * streams of each must fit into 65,536.
    """

    streams: int
    stages: int
    loading_registers: int = 40
    computing_registers: int = 216


TILINGS = {
    128: Tiling(streams=2, stages=3),  # 2 x 3 x 32 KiB: one stage more does not fit
    64: Tiling(streams=2, stages=6),
}
"""By head size."""


_supposed: int | None = None


def multiprocessors() -> int:
    """How many thread blocks run at a time on the device that jax computes on."""
    return _supposed or getattr(jax.devices()[0], "core_count", None) or MULTIPROCESSORS


def suppose_multiprocessors(count: int) -> None:
    """For a process that lowers for another device than it has."""
    global _supposed
    _supposed = count
