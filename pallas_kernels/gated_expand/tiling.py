"""How the gated expansion is cut: sizes of an item, and what a thread block keeps in flight."""

from dataclasses import dataclass

from pallas_kernels.lora_expand.plan import TILE, piece_columns
from pallas_kernels.lora_expand.tiling import PROCESSORS

SHARED_BYTES = 222 * 1024
"""Shared memory of a thread block for B, y, low and h; slots, owners and barriers take the rest of its 227 KiB."""

CUTS = ((128, 64), (64, 32), (32, 32))
"""Columns of an item, and of them a computing warpgroup's. Wide ones read low least often; where there are few, or B
is high, narrower ones: B of the last cut fits for the highest rank axis that ``lora_expand`` takes."""

ROUNDS = 8
"""Items of a thread block from which on the last round of them, in which not all have one, hardly counts."""

LEAST_STAGES, MOST_STAGES = 3, 6
"""Tiles of y in shared memory: one is worked on, the others come."""

LEAST_RING, MOST_RING = 2, 4
"""Pieces of low in shared memory, each of gate and up."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of one thread block.

    Attributes:
        columns: columns of gate, and as many of up, in an item; they divide the width.
        part: of them a warpgroup's, and those of one copy.
        stages: tiles of y in shared memory.
        ring: pieces of low in shared memory.
        b_places: 2 if B of the next columns comes while that of the last ones is in use, else 1.
        blocks: thread blocks that share the work.
    """

    columns: int
    part: int
    stages: int
    ring: int
    b_places: int
    blocks: int = PROCESSORS

    @property
    def workers(self) -> int:
        """Warpgroups that compute."""
        return self.columns // self.part


def tiling_for(slots: int, rank: int, width: int, low_bytes: int) -> Tiling:
    """Tiling of a call; ``low_bytes``: of one value of low."""
    tiles = -(-slots // TILE)
    for columns, part in CUTS:
        enough = part == 32 or tiles * (width // columns) >= ROUNDS * PROCESSORS
        if enough and width % columns == 0:
            for b_places in (2, 1):
                if tiling := fitting(rank, columns, part, b_places, low_bytes):
                    return tiling
    raise AssertionError(f"no tiling for a width of {width} and a rank axis of {rank} columns")


def fitting(rank: int, columns: int, part: int, b_places: int, low_bytes: int) -> Tiling | None:
    """The tiling with so many places for B that fills the shared memory; None if that is too small."""
    piece = piece_columns(rank)
    y_bytes, of_low, h_bytes = 4 * TILE * columns, 2 * TILE * piece * low_bytes, 2 * TILE * columns
    free = SHARED_BYTES - h_bytes - b_places * 4 * columns * (-(-rank // piece) * piece)
    ring = min((free - LEAST_STAGES * y_bytes) // of_low, MOST_RING)
    if ring < LEAST_RING:
        return None
    stages = min((free - ring * of_low) // y_bytes, MOST_STAGES)
    return Tiling(columns, part, stages, ring, b_places)
