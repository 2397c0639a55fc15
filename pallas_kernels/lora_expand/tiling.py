"""How the expansion is cut: sizes of an item, and how many of them are in flight."""

import math
from dataclasses import dataclass

from pallas_kernels.lora_expand.plan import TILE, piece_columns

PART = 64
"""Columns of y in one copy: 128 bytes, the widest that shared memory can hold without conflicts between rows."""

MAX_RANK = 1024
"""Columns of the rank axis that fit into shared memory with 64 columns of B."""

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""

SHARED_BYTES = 221 * 1024
"""Shared memory of a multiprocessor for B, owners, y and low of its thread blocks; their slots and barriers, and what
the system keeps of each, take the rest of its 228 KiB."""

PLACED = 1024
"""Bytes that every array in shared memory begins at a multiple of."""

STAGES = 3
"""Tiles of y in shared memory: one comes, one is worked on, one goes."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of one thread block.

    Attributes:
        columns: columns of y in an item, a multiple of 64 that divides every module's width.
        ring: pieces of low in flight.
        blocks: thread blocks that share the work.
        stages: tiles of y in shared memory.
    """

    columns: int
    ring: int
    blocks: int
    stages: int = STAGES


def tiling_for(slots: int, rank: int, widths: tuple[int, ...], residual: bool = False) -> Tiling:
    """Tiling for a call: two thread blocks on a multiprocessor if they fit, with as wide items as fit and divide."""
    piece = piece_columns(rank)
    high, low_bytes = -(-rank // piece) * piece, 4 * TILE * piece
    owner_bytes = -(-4 * high // PLACED) * PLACED
    items = lambda columns: -(-slots // TILE) * (sum(widths) // columns)
    for columns, together in ((2 * PART, 2), (PART, 2), (PART, 1)):
        used = 2 * columns * (high + STAGES * TILE * (1 + residual)) + owner_bytes
        ring = min((SHARED_BYTES // together - used) // low_bytes, 4)
        enough = columns == PART or items(columns) >= PROCESSORS
        if ring >= 2 and enough and math.gcd(columns, *widths) == columns:
            return Tiling(columns, ring, PROCESSORS * together)
    raise AssertionError(f"no tiling for a rank axis of {rank} columns")
