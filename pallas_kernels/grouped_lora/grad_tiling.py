"""How the gradients of low-rank factors are cut: tokens over tiles, columns over the warpgroups of a tile's blocks."""

from dataclasses import dataclass, replace

COLUMNS = 64
"""Columns of a piece of x or d_y: of a 16-bit type one swizzled row of 128 bytes."""

ROWS = 64
"""Rows of a tensor-core tile; tokens come in multiples of it."""

RANK_STEP = 16
"""The tensor core contracts over ranks in multiples of this; smaller ones are padded with zeros."""

SHARED_BYTES = 227 * 1024
BARRIER_BYTES = 1024
"""Set aside for barriers and the alignment of buffers."""

MOST_RANKS = 256
"""Columns of a tensor-core product: the ranks of all modules lie side by side in one."""

MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM); on GPUs with fewer, some blocks wait for others."""

LEAST_ROWS = 8
"""Of a tile, that a block adds up for all: fewer have too few values for its threads."""

MOST_SHARES = 16
"""Each block of a tile reads what all of them have of the cotangent of x a: twice the blocks, twice that."""


@dataclass(frozen=True)
class GradTiling:
    """One tile has ``tokens`` tokens; its ``shares`` blocks of ``workers`` warpgroups divide the columns.

    Attributes:
        slots: pieces that one warpgroup holds or has in flight.
        staged: sums on their way to memory that one warpgroup holds.
        rotates: every tile begins at another piece, so that they do not all add to the same sums at a time.
        shares_rows: every block adds up some rows of the cotangent of x a for all, and waits a second time.
    """

    tokens: int
    workers: int
    slots: int
    staged: int = 2
    shares: int = 8
    rotates: bool = True
    shares_rows: bool = False

    def shared_bytes(self, modules: int, rank: int) -> int:
        """Shared memory of one block for ``modules`` modules of this (padded) rank."""
        piece = 2 * COLUMNS * (self.tokens + modules * rank)
        staged = 4 * COLUMNS * rank * (self.staged + modules * self.sum_tiles)
        low = 2 * 2 * self.tokens * modules * rank
        return BARRIER_BYTES + low + self.workers * (self.slots * piece + staged)

    @property
    def sum_tiles(self) -> int:
        """Tiles of 64 rows that hold either the cotangent of x a, or sums of d_a on their way."""
        return max(self.staged, self.tokens // ROWS)


PREFERRED = (
    GradTiling(tokens=128, workers=2, slots=5),
    GradTiling(tokens=128, workers=2, slots=4),
    GradTiling(tokens=128, workers=2, slots=3),
    GradTiling(tokens=128, workers=2, slots=2, staged=1),
)
"""For more than 1024 tokens. Every tile adds to the sums once, so large tiles are better where they fill the GPU. What
is loaded while blocks exchange their terms, some 4 microseconds of all memory bandwidth, should fit into the slots."""

PREFERRED_FEW_TOKENS = (
    GradTiling(tokens=64, workers=2, slots=6),
    GradTiling(tokens=64, workers=2, slots=4),
    GradTiling(tokens=64, workers=2, slots=2, staged=1),
    GradTiling(tokens=64, workers=1, slots=2, staged=1),
)

INTERPRETED = GradTiling(tokens=64, workers=1, slots=2, staged=1, shares=2)
"""The interpreter runs the warpgroups of a tile as threads, all at once; machines with two cores have two."""


def takes(tokens: int, modules: int, rank: int) -> bool:
    """Whether there is a tiling for so many modules of this rank."""
    return _fitting(tokens, modules, rank) is not None


def grad_tiling(tokens: int, modules: int, rank: int) -> GradTiling:
    """The first preferred tiling that divides the tokens and fits into shared memory.

    Raises:
        ValueError: none fits.
    """
    tiling = _fitting(tokens, modules, rank)
    if tiling is None:
        raise ValueError(
            f"grouped_lora_grad: {modules} modules of rank {rank} do not fit into {SHARED_BYTES} bytes of shared memory"
            f", or are more than {MOST_RANKS} ranks; take the modules one by one, or implementation='reference'"
        )
    return tiling


def _fitting(tokens: int, modules: int, rank: int) -> GradTiling | None:
    large = PREFERRED if tokens > 1024 and tokens % 128 == 0 else ()
    padded = -(-rank // RANK_STEP) * RANK_STEP
    for tiling in (*large, *PREFERRED_FEW_TOKENS):
        if tiling.shared_bytes(modules, padded) <= SHARED_BYTES and modules * padded <= MOST_RANKS:
            shares = _shares(tokens // tiling.tokens)
            return replace(tiling, shares=shares, shares_rows=modules > 1 and tiling.tokens // shares >= LEAST_ROWS)
    return None


def _shares(tiles: int) -> int:
    """The power of two that lets all blocks run at once and leaves few multiprocessors without one."""
    most = min(MOST_SHARES, max(1, MULTIPROCESSORS // tiles))
    return 1 << (most.bit_length() - 1)
