"""How a row product is cut: the columns and inputs of a thread block, and how many steps it has in flight."""

from dataclasses import dataclass

ROWS = 64
"""Rows of the smallest tensor-core product, and most rows that the kernel takes. Rows that x lacks are never read from
memory or written; multiplying them costs less than the time in which the weights arrive."""

STEP = 64
"""Inputs that a step multiplies."""

COLUMN_UNIT = 16
"""The columns of a thread block are a multiple of this, and at most 256, as those of a tensor-core product."""

PREFERRED_UNIT = 32
"""A multiple of this where it divides the columns: wider rows in shared memory, fewer blocks to read x."""

MULTIPROCESSORS = 132
"""Of an H100 or H200."""

SATURATING = 96
"""Thread blocks that use all the bandwidth there is: with 96 of them qkv of Llama 3.1 8B took 16.3 us, with 128 of
them 17.1 us (8 rows, H200)."""

SHARED_BYTES = 220_000
"""Shared memory that a thread block may use, of 227 KiB; the rest is for barriers."""

THIN = 512
"""Up to so many outputs, as those of low-rank factors, the splits of a column are a cluster that adds up in the kernel:
another launch for the sums would take as long as the product."""

CLUSTER = 8
"""Thread blocks of a cluster, the most that every Hopper GPU can place. Each adds up 8 of 64 rows."""

MOST_STAGES = 6
MOST_SPLITS = 8


@dataclass(frozen=True)
class Tiling:
    """Sizes of one thread block.

    Attributes:
        columns: columns of the weights, a multiple of 16 up to 256 that divides all of them.
        splits: parts into which the inputs are split, each summed by thread blocks of its own.
        stages: steps in flight, at least 2: a step is released when the next one multiplies.
        joined: thread blocks of the same columns, 2 to 8 of them, add up their sums; otherwise XLA does.
    """

    columns: int
    splits: int
    stages: int
    joined: bool = False

    @property
    def swizzle(self) -> int:
        """Bytes of a row in the bank order of x and weights in shared memory; columns are whole rows."""
        return max(width for width in (128, 64, 32) if 2 * self.columns % width == 0)


def tiling_for(rows: int, inputs: int, outputs: int, *, may_join: bool = False) -> Tiling:
    """The tiling that should take least time for shapes that the kernel takes; ``may_join``: also joined ones."""
    steps, unit = inputs // STEP, COLUMN_UNIT if outputs % PREFERRED_UNIT else PREFERRED_UNIT
    if may_join and outputs <= THIN and steps >= CLUSTER:
        return Tiling(unit, CLUSTER, stages_for(unit, split=True), joined=True)
    widths = [columns for columns in range(unit, 257, unit) if outputs % columns == 0]
    pairs = [(columns, splits) for splits in range(1, min(MOST_SPLITS, steps) + 1) for columns in reversed(widths)]
    columns, splits = min(pairs, key=lambda pair: cost(rows, inputs, outputs, *pair))
    return Tiling(columns, splits, stages_for(columns, split=splits > 1))


def cost(rows: int, inputs: int, outputs: int, columns: int, splits: int) -> float:
    """Bytes moved, by their time in units of a byte from memory, over the share of the bandwidth that is used.

    The weights come from memory once. Every thread block reads its inputs of x from the L2 cache, which has little more
    bandwidth. Every split writes its sums there in float32 when its stream has ended, and whoever adds them up reads
    them. The two factors are guesses that agree with the one ranking measured: qkv of Llama 3.1 8B, 8 rows (128
    columns, 2 splits: 16.3 us; 192, 4: 17.1 us; 96, 2: 17.5 us).
    """
    weights = 2 * inputs * outputs
    x = 2 * rows * inputs * (outputs // columns)
    sums = 4 * rows * outputs * splits if splits > 1 else 0
    blocks = outputs // columns * splits
    rounds = -(-blocks // MULTIPROCESSORS)
    return (weights + 0.75 * x + 4 * sums) / min(1.0, blocks / rounds / SATURATING)


def stages_for(columns: int, *, split: bool) -> int:
    """As many as fit beside the result."""
    result = ROWS * columns * (4 if split else 2)
    return min(MOST_STAGES, (SHARED_BYTES - result) // (2 * STEP * (ROWS + columns)))
