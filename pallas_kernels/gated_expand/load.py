"""The loading warpgroup: tiles of y, and of those that an adapter touches B when the columns change, and low.

What a tile of y needs is known before anything of the plan is read, so its copies go first.
"""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_expand.items import for_own_items
from pallas_kernels.lora_expand.items import copy_rows

MODULES = range(2)
"""Gate and up."""


def load_items(shape, arrays, shared):
    tiling = shape.tiling

    def load(item):
        stage = lax.rem(item.items, tiling.stages)
        pl.when(item.items >= tiling.stages)(lambda: plgpu.barrier_wait(shared.y_read.at[stage]))
        _load_y(shape, arrays, shared, item, stage)

        @pl.when(item.needs_strip)
        def _():
            place = lax.rem(item.strip, tiling.b_places)
            pl.when(item.strip >= tiling.b_places)(lambda: plgpu.barrier_wait(shared.b_read.at[place]))
            _load_b(shape, arrays, shared, item, place)

        def load_low(i, _):
            place = lax.rem(item.pieces + i, tiling.ring)
            pl.when(item.pieces + i >= tiling.ring)(lambda: plgpu.barrier_wait(shared.low_read.at[place]))
            _load_low(shape, arrays, shared, item, item.first + i, place)

        lax.fori_loop(0, item.count, load_low, None)

    items, pieces, strips = for_own_items(shape, arrays.pieces, load)
    _wait_for(shared.y_read, items - tiling.stages, items, tiling.stages)
    _wait_for(shared.low_read, pieces - tiling.ring, pieces, tiling.ring)
    _wait_for(shared.b_read, strips - tiling.b_places, strips - 1, tiling.b_places)  # the last is not given back


def _wait_for(barriers, first, end, places):
    """Until nobody reads what numbers ``first`` to ``end`` brought."""
    wait = lambda i, _: plgpu.barrier_wait(barriers.at[lax.rem(i, places)])
    lax.fori_loop(lax.max(first, 0), end, wait, None)


def _load_y(shape, arrays, shared, item, stage):
    loaded = shared.y_loaded.at[stage]
    plgpu.copy_gmem_to_smem(arrays.slots.at[item.tile], shared.slots.at[stage], loaded)
    plgpu.copy_gmem_to_smem(arrays.scale.at[item.tile], shared.scale.at[stage], loaded)

    def copy(slots, rows):
        for module in MODULES:
            for worker in range(shape.tiling.workers):
                part = arrays.y.at[slots, shape.columns(item, module, worker)]
                plgpu.copy_gmem_to_smem(part, shared.y.at[stage, shape.share(module, worker), rows], loaded)

    copy_rows(shape, item.tile, copy)


def _load_b(shape, arrays, shared, item, place):
    layer, loaded = arrays.layer[0], shared.b_loaded.at[place]

    def load_piece(i, _):
        rows = pl.ds(pl.multiple_of(i * shape.piece, shape.piece), shape.piece)  # beyond the rank axis they become 0
        for module in MODULES:
            for worker in range(shape.tiling.workers):
                part = arrays.b.at[layer, rows, shape.columns(item, module, worker)]
                plgpu.copy_gmem_to_smem(part, shared.b.at[place, i, shape.share(module, worker)], loaded)

    lax.fori_loop(0, shape.pieces, load_piece, None)
    plgpu.copy_gmem_to_smem(arrays.owner, shared.owner.at[place], loaded)


def _load_low(shape, arrays, shared, item, piece, place):
    def copy(slots, rows):
        for module in MODULES:
            columns = pl.ds(shape.low_after + module * shape.rank + piece * shape.piece, shape.piece)
            low = arrays.low.at[slots, columns]
            plgpu.copy_gmem_to_smem(low, shared.low.at[place, module, rows], shared.low_loaded.at[place])

    copy_rows(shape, item.tile, copy)
