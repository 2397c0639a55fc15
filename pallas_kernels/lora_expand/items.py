"""Items: what a thread block takes one after another, a tile of 64 slots by some columns of y.

Only the first tile may have fewer slots, so that a chunk of whole tiles behind any number of rows has one adapter per
tile:

    150 slots  ->  0 .. 21 | 22 .. 85 | 86 .. 149
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lora_expand.plan import TILE, piece_columns
from pallas_kernels.lora_expand.tiling import PART, Tiling


@dataclass(frozen=True)
class Tiled:
    """Slots in tiles, and the rank axis in pieces."""

    slots: int
    rank: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.slots, TILE)

    @property
    def first_slots(self) -> int:
        """Slots of the first tile."""
        return self.slots - (self.tiles - 1) * TILE

    @property
    def piece(self) -> int:
        return piece_columns(self.rank)

    @property
    def pieces(self) -> int:
        """Pieces of the rank axis; the last one may reach beyond it."""
        return pl.cdiv(self.rank, self.piece)


@dataclass(frozen=True)
class Shape(Tiled):
    """Static numbers of a call.

    Attributes:
        slots, rank, widths: see ``api.lora_expand``.
        interpreted: runs in the interpreter.
        low_after: columns before low in the array that holds it: those of y where low lies behind it.
        residual: whether there is one, so that every item is written, not only those to which an adapter adds.
    """

    widths: tuple[int, ...]
    tiling: Tiling
    interpreted: bool
    low_after: int = 0
    residual: bool = False

    @property
    def parts(self) -> int:
        """Copies that an item's columns of y take."""
        return self.tiling.columns // PART

    @property
    def items(self) -> int:
        return self.tiles * (sum(self.widths) // self.tiling.columns)

    @property
    def blocks(self) -> int:
        return min(self.items, self.tiling.blocks)

    def module(self, column):
        """The module that has a column of y."""
        ends = [sum(self.widths[:count]) for count in range(1, len(self.widths))]
        return sum(((column >= end).astype(jnp.int32) for end in ends), start=jnp.int32(0))

    def columns_of_parts(self, column):
        """The columns of y in each copy of an item that starts at ``column``."""
        return [pl.ds(column + part * PART, PART) for part in range(self.parts)]


class Item(NamedTuple):
    """One item and what the warpgroup has done before: int32 scalars.

    Attributes:
        tile, column: number of the tile of slots; first column of y.
        first, count: pieces of the rank axis that the tile needs.
        items, pieces: done before.
        column_before: of the last item that needed B, whose columns of it are in shared memory; -1 if there is none.
    """

    tile: Any
    column: Any
    first: Any
    count: Any
    items: Any
    pieces: Any
    column_before: Any

    @property
    def starts_columns(self):
        """Whether the item needs other columns of B than are there."""
        return (self.count > 0) & (self.column != self.column_before)


def for_own_items(shape, pieces, run):
    """Calls ``run(item)`` for the items of this thread block that are written, tile by tile, then columns.

    Args:
        pieces: see ``plan.Plan``.

    Returns:
        How many items and how many pieces those were.
    """

    def step(index, done):
        tile, column = lax.rem(index, shape.tiles), lax.div(index, shape.tiles) * shape.tiling.columns
        item = Item(tile, column, pieces[tile, 0], pieces[tile, 1], *done)
        active = (item.count > 0) | shape.residual
        pl.when(active)(lambda: run(item))
        column_before = jnp.where(item.count > 0, column, item.column_before)
        return item.items + active.astype(jnp.int32), item.pieces + item.count, column_before

    block = lax.axis_index("block")
    bounds = (lax.div((block + i) * shape.items, shape.blocks) for i in range(2))
    items, pieces_done, _ = lax.fori_loop(*bounds, step, (jnp.int32(0), jnp.int32(0), jnp.int32(-1)))
    return items, pieces_done


def copy_rows(shape, tile, copy):
    """Calls ``copy(slots, rows)`` with the tile's slots of the token axis and its as many rows of shared memory."""
    first = lambda: copy(pl.ds(0, shape.first_slots), pl.ds(0, shape.first_slots))
    other = lambda: copy(pl.ds(shape.first_slots + (tile - 1) * TILE, TILE), pl.ds(0, TILE))
    if shape.first_slots == TILE:
        return other()
    pl.when(tile == 0)(first)
    if shape.tiles > 1:
        pl.when(tile > 0)(other)
