"""How a page write is cut into the pieces that the copy engine moves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.page_write.parts import Tiles

MULTIPROCESSORS = 132
"""Of an H100 or H200: fewer blocks leave some of them idle."""

MOST_IN_FLIGHT = 4
"""Copies that one block has in flight; more blocks share a multiprocessor when each has few."""

STAGED_BYTES = 64 * 1024
"""Shared memory of one block at most."""

COLUMNS = 64
"""Columns of a piece: in a 16-bit type one line of memory, 128 bytes, of every row. A piece of a single row has all of
it: they lie side by side in memory."""


@dataclass(frozen=True)
class PieceTiling:
    """``count`` pieces of ``rows`` x ``columns`` values, ``pieces`` of them in flight in one block."""

    rows: int
    columns: int
    pieces: int
    count: int

    @property
    def blocks(self) -> int:
        return -(-self.count // self.pieces)

    @property
    def staged(self) -> tuple[int, ...]:
        """Shape of what one block has in flight."""
        return (self.pieces, self.columns) if self.rows == 1 else (self.pieces, self.rows, self.columns)


def piece_tilings(parts: Sequence[Tiles], width: int) -> list[PieceTiling]:
    """For parts of one write into pages of rows of ``width``: a block has pieces of one part, and few as long as those
    of all parts leave multiprocessors idle."""
    copies = sum(_count(part, _columns(part, width)) for part in parts)
    in_flight = min(MOST_IN_FLIGHT, max(1, copies // MULTIPROCESSORS))
    return [_tiling(part, _columns(part, width), in_flight) for part in parts]


def _tiling(part: Tiles, columns: int, in_flight: int) -> PieceTiling:
    fitting = max(1, STAGED_BYTES // (part.rows * columns * part.values.dtype.itemsize))
    return PieceTiling(part.rows, columns, min(in_flight, fitting), _count(part, columns))


def _columns(part: Tiles, width: int) -> int:
    most = math.gcd(width, part.columns)
    return most if part.rows == 1 else math.gcd(most, COLUMNS)


def _count(part: Tiles, columns: int) -> int:
    return part.places.shape[0] * (part.columns // columns)
