"""How a page write is cut into the pieces that the copy engine moves."""

import math
from dataclasses import dataclass

MULTIPROCESSORS = 132
"""Of an H100 or H200: fewer blocks leave some of them idle."""

MOST_IN_FLIGHT = 4
"""Copies that one block has in flight; more blocks share a multiprocessor when each has few."""

STAGED_BYTES = 64 * 1024
"""Shared memory of one block at most."""

COLUMNS = 64
"""Columns of a piece: in a 16-bit type one line of memory, 128 bytes, of every row."""


@dataclass(frozen=True)
class PieceTiling:
    """Pieces of ``rows`` x ``columns`` values, ``pieces`` of them in flight in one block."""

    rows: int
    columns: int
    pieces: int


def rows_per_block(rows: int, row_bytes: int) -> int:
    """Rows that one block has in flight."""
    return min(max(1, STAGED_BYTES // row_bytes), _in_flight(rows))


def piece_tiling(tiles: int, page_tokens: int, width: int, columns: int) -> PieceTiling:
    """For ``tiles`` tiles of values of ``columns`` columns, into pages of rows of ``width``."""
    piece = math.gcd(width, columns, COLUMNS)
    return PieceTiling(rows=page_tokens, columns=piece, pieces=_in_flight(tiles * (columns // piece)))


def _in_flight(copies: int) -> int:
    return min(MOST_IN_FLIGHT, max(1, copies // MULTIPROCESSORS))
