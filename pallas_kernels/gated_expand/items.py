"""Items: what a thread block takes one after another, a tile of 64 slots by some columns of gate and the same of up.

Tiles are those of ``lora_expand.items``. Columns change last, so that B of them stays where it is:

    3 tiles, 2 strips of columns  ->  (tile 0, strip 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gated_expand.tiling import Tiling
from pallas_kernels.lora_expand.items import Tiled


@dataclass(frozen=True)
class Shape(Tiled):
    """Static numbers of a call.

    Attributes:
        slots, rank, width: see ``api.gated_expand``.
        low_after: columns before low in the array that holds it: those of y where low lies behind it.
        interpreted: runs in the interpreter.
    """

    width: int
    tiling: Tiling
    low_after: int
    interpreted: bool

    @property
    def items(self) -> int:
        return self.tiles * (self.width // self.tiling.columns)

    @property
    def blocks(self) -> int:
        return min(self.items, self.tiling.blocks)

    def columns(self, item, module, worker):
        """The columns of y that a worker has of an item's gate (module 0) or up (1)."""
        return pl.ds(module * self.width + item.column + worker * self.tiling.part, self.tiling.part)

    def share(self, module, worker):
        """Number of a worker's columns of gate (module 0) or up (1) among all of an item. No index of its own for the
        module: Mosaic takes no constant index of an operand of a product."""
        return worker + module * self.tiling.workers


class Item(NamedTuple):
    """One item and what the thread block has done before: int32 scalars.

    Attributes:
        tile, column: number of the tile of slots; first column of gate and of up.
        first, count: pieces of the rank axis that the tile needs.
        items, pieces: done before.
        strips: strips of columns of B that were needed before this item.
        needs_strip: whether this item is the first to need B of its columns.
    """

    tile: Any
    column: Any
    first: Any
    count: Any
    items: Any
    pieces: Any
    strips: Any
    needs_strip: Any

    @property
    def strip(self):
        """Number of the strip of B that this item is multiplied with."""
        return self.strips + self.needs_strip.astype(jnp.int32) - 1


def for_own_items(shape, pieces, run):
    """Calls ``run(item)`` for the items of this thread block.

    Args:
        pieces: see ``lora_expand.plan.Plan``.

    Returns:
        How many items, pieces and strips those were.
    """

    def step(index, done):
        *before, column_of_b = done
        tile, column = lax.rem(index, shape.tiles), lax.div(index, shape.tiles) * shape.tiling.columns
        first, count = pieces[tile, 0], pieces[tile, 1]
        item = Item(tile, column, first, count, *before, (count > 0) & (column != column_of_b))
        run(item)
        return item.items + 1, item.pieces + count, item.strip + 1, jnp.where(count > 0, column, column_of_b)

    block, nothing = lax.axis_index("block"), jnp.int32(0)
    bounds = (lax.div((block + i) * shape.items, shape.blocks) for i in range(2))
    return lax.fori_loop(*bounds, step, (nothing, nothing, nothing, jnp.int32(-1)))[:3]
