"""How the chunk kernel cuts its work: tile sizes, and which work item a thread block takes when."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

PAGE = 64
"""Keys in a page."""

QUERIES = 64
"""Queries in a tile: the rows of one tensor-core product of a warpgroup."""

ALIGNMENT = 8
"""What the first slot of every tile must be a multiple of: shared memory is swizzled in groups of that many rows."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of one thread block.

    Attributes:
        heads: query heads of a work item; one compute warpgroup for each.
        registers: registers of a thread that computes.
        pages: pages in a block of keys.
        stages: blocks of keys (and of values) in flight.
        thread_blocks: thread blocks that share the work.
    """

    heads: int
    registers: int
    pages: int = 2
    stages: int = 2
    thread_blocks: int = 132

    @property
    def keys(self) -> int:
        """Keys in a block."""
        return self.pages * PAGE


def tiling_for(group: int) -> Tiling:
    """Tiling for groups of that many query heads.

    Measured on an H200 with 32 / 8 heads of 128 (TFLOP/s at 2048 and 8192 tokens from nothing): 389 and 626; blocks of
    64 keys 342 and 540; compute warpgroups that issue their products in turn 385 and 603; a thread block for each item
    349 and 576; cuDNN 319 and 555. Registers: what remains of 65,536 beside the loading warpgroup's.
    """
    return Tiling(heads=1, registers=248) if group == 1 else Tiling(heads=2, registers=240)


class Item(NamedTuple):
    """One work item: int32 scalars.

    Attributes:
        slots: where the tile's queries stand, a slice.
        first_head: the first of its query heads; the last item of a group may have fewer heads than warpgroups.
        position: position of the tile's first query.
        context: keys that its last query sees; 0 for an inactive tile.
        blocks: blocks of keys that hold the context.
    """

    tile: Any
    slots: Any
    kv_head: Any
    first_head: Any
    position: Any
    context: Any
    blocks: Any


@dataclass(frozen=True)
class Items:
    """All work items of a call, those of the longest contexts first.

    Attributes:
        tiles, kv_heads, group: how many there are; a group is the query heads of one K/V head.
        first_slot: of the first tile.
        positions, contexts: [tiles] int32 refs.
        order: [tiles] int32 ref, tiles in the order of falling context.
    """

    tiling: Tiling
    tiles: int
    first_slot: int
    kv_heads: int
    group: int
    positions: Any = None
    contexts: Any = None
    order: Any = None

    @property
    def per_kv_head(self) -> int:
        return -(-self.group // self.tiling.heads)

    @property
    def count(self) -> int:
        return self.tiles * self.kv_heads * self.per_kv_head

    def __getitem__(self, index) -> Item:
        tile = self.order[lax.div(index, self.kv_heads * self.per_kv_head)]
        kv_head = lax.rem(lax.div(index, self.per_kv_head), self.kv_heads)
        first_head = kv_head * self.group + lax.rem(index, self.per_kv_head) * self.tiling.heads
        context = self.contexts[tile]
        blocks = lax.div(context + (self.tiling.keys - 1), self.tiling.keys)
        slots = pl.ds(pl.multiple_of(self.first_slot + tile * QUERIES, ALIGNMENT), QUERIES)
        return Item(tile, slots, kv_head, first_head, self.positions[tile], context, blocks)

    def for_each(self, run, start):
        """Folds ``run(item, carry)`` over the items of this thread block.

        The items are dealt back and forth (0 1 2, 5 4 3, 6 7 8 for three thread blocks), so that all get about the
        same number of keys.
        """
        blocks, block = lax.axis_size("block"), lax.axis_index("block")
        backwards = blocks - 1 - block

        def deal(turn, carry):
            place = jnp.where(lax.rem(turn, 2) == 0, block, backwards)
            return run(self[turn * blocks + place], carry)

        whole, rest = divmod(self.count, blocks)
        last = block if whole % 2 == 0 else backwards
        return lax.fori_loop(0, whole + (last < rest).astype(jnp.int32), deal, start)
