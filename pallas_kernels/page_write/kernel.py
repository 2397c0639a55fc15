"""The page writes on a Hopper GPU: rows and pieces of pages that its copy engine (TMA) takes through shared memory.

Many small blocks, each with all its loads in flight at once and a store as soon as a piece is there: every value is
moved once, and no thread holds any. Knows layers, pages and places, nothing of what the rows mean.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import whole
from pallas_kernels.page_write.parts import Tiles
from pallas_kernels.page_write.tiling import PieceTiling, piece_tilings

COPY_BYTES = 16
"""The copy engine moves, and begins at, multiples of this."""


def write_parts(pool, layer, parts: Sequence[Tiles], *, interpret=None):
    """See ``api.write_parts``; none of the parts is empty."""
    for part in parts:
        for width in (pool.shape[-1], part.values.shape[1], part.columns):
            _check_row(width, pool.dtype)
    tilings = piece_tilings(parts, pool.shape[-1])
    shapes = sorted({tiling.staged for tiling in tilings})
    staged = [plgpu.SMEM(shape, pool.dtype) for shape in shapes]
    races = interpret is not None and interpret.detect_races  # they would be seen between blocks' pieces in one place
    scratch = tuple(staged) if races or len(staged) == 1 else plgpu.RefUnion(*staged)
    run = plgpu.kernel(
        functools.partial(_body, parts, tilings, shapes),
        out_type=(),
        scratch_types=(scratch, plgpu.Barrier(num_barriers=max(tiling.pieces for tiling in tilings))),
        grid=(sum(tiling.blocks for tiling in tilings),),
        grid_names=("block",),
        interpret=interpret,
        kernel_name="page_write",
    )
    arrays = [array for part in parts for array in (part.values, part.places.astype(jnp.int32))]
    written = jax.new_ref(pool)
    run(written, *whole(jnp.asarray(layer, jnp.int32).reshape(1), *arrays))
    return jax.freeze(written)


def _check_row(width, dtype):
    if width * dtype.itemsize % COPY_BYTES:
        raise ValueError(
            f"page_write: the Mosaic GPU kernel copies rows of multiples of {COPY_BYTES} bytes, not {width} {dtype}"
        )


def _body(parts, tilings, shapes, pool, layer, *refs):
    """One block: pieces of one part. Blocks of one part follow those of another."""
    *arrays, staged, loaded = refs
    block, first = lax.axis_index("block"), 0
    for part, tiling, values, places in zip(parts, tilings, arrays[::2], arrays[1::2], strict=True):
        own = staged[shapes.index(tiling.staged)], loaded
        copy = functools.partial(_copy, part, tiling, block - first, pool, layer, values, places, *own)
        if len(parts) == 1:
            copy()
        else:
            pl.when((block >= first) & (block < first + tiling.blocks))(copy)
        first += tiling.blocks


def _copy(part: Tiles, tiling: PieceTiling, block, pool, layer, values, places, staged, loaded):
    """The pieces of one block of a part: they run along the columns, then to the next tile."""
    _, pool_pages, page_tokens, width = pool.shape
    across, per_page = part.columns // tiling.columns, page_tokens // part.rows
    first = block * tiling.pieces

    def piece(i):
        """(tile, column) of a piece, and (page of the tile, column of the page) that it goes to."""
        number = jnp.minimum(first + i, tiling.count - 1)
        if across == 1:
            return (number, 0), (0, 0)
        column = lax.rem(number, across) * tiling.columns
        return (lax.div(number, across), column), (lax.div(column, width), lax.rem(column, width))

    def window(row, column):
        return (row if part.rows == 1 else pl.ds(row, part.rows)), pl.ds(column, tiling.columns)

    for i in range(tiling.pieces):
        (tile, column), _ = piece(i)
        source = values.at[window(part.first_row + tile * part.rows, column)]
        in_bounds = dict(oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS) if part.rows == 1 else {}
        plgpu.copy_gmem_to_smem(source, staged.at[i], loaded.at[i], **in_bounds)
    for i in range(tiling.pieces):
        (tile, _), (page_of_tile, column) = piece(i)
        place = places[tile, page_of_tile]
        page, row = (place, 0) if per_page == 1 else (lax.div(place, per_page), lax.rem(place, per_page) * part.rows)
        plgpu.barrier_wait(loaded.at[i])

        @pl.when((first + i < tiling.count) & (place >= 0) & (page < pool_pages))
        def _store(i=i, page=page, row=row, column=column):
            plgpu.copy_smem_to_gmem(staged.at[i], pool.at[layer[0], page, *window(row, column)])

    plgpu.wait_smem_to_gmem(0)
