"""The page writes on a Hopper GPU: rows and pieces of pages that its copy engine (TMA) takes through shared memory.

Many small blocks, each with all its loads in flight at once and a store as soon as a piece is there: every value is
moved once, and no thread holds any. Knows layers, pages and slots, nothing of what the rows mean.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import whole
from pallas_kernels.page_write.tiling import PieceTiling, piece_tiling, rows_per_block

IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
COPY_BYTES = 16
"""The copy engine moves, and begins at, multiples of this."""


def page_write(pool, layer, rows, slots, *, interpret=None):
    """See ``api.page_write``."""
    _, pages, page_tokens, width = pool.shape
    count = slots.shape[0]
    _check_row("page_write", width, rows.dtype)
    group = rows_per_block(count, width * rows.dtype.itemsize)

    def body(pool, rows, slots, layer, staged, loaded):
        first = lax.axis_index("block") * group
        row_of = lambda i: jnp.minimum(first + i, count - 1)
        for i in range(group):
            plgpu.copy_gmem_to_smem(rows.at[row_of(i)], staged.at[i], loaded.at[i], oob_mode=IN_BOUNDS)
        for i in range(group):
            slot = slots[row_of(i)]
            page, offset = lax.div(slot, page_tokens), lax.rem(slot, page_tokens)
            plgpu.barrier_wait(loaded.at[i])

            @pl.when((first + i < count) & (slot >= 0) & (page < pages))
            def _store(i=i, page=page, offset=offset):
                plgpu.copy_smem_to_gmem(staged.at[i], pool.at[layer[0], page, offset])

        plgpu.wait_smem_to_gmem(0)

    run = _blocks(body, "page_write", pl.cdiv(count, group), (group, width), rows.dtype, interpret)
    return _in_place(run, pool, layer, rows, slots)


def write_pages(
    pool, layer, values, pages, *, first_row, columns, interpret=None, tiling: PieceTiling | None = None
):
    """See ``api.write_pages``."""
    _, pool_pages, page_tokens, width = pool.shape
    _check_row("write_pages", width, values.dtype)
    for each in (values.shape[1], columns):
        _check_row("write_pages", each, values.dtype)
    tiling = tiling or piece_tiling(pages.shape[0], page_tokens, width, columns)
    across, down = columns // tiling.columns, page_tokens // tiling.rows
    count = pages.shape[0] * down * across

    def place(piece):
        """(tile, row, column) of a piece: they run along the columns, then down the tile, then to the next tile."""
        piece = jnp.minimum(piece, count - 1)
        column = lax.rem(piece, across) * tiling.columns
        row = lax.rem(lax.div(piece, across), down) * tiling.rows
        return lax.div(piece, across * down), row, column

    def body(pool, values, pages, layer, staged, loaded):
        first = lax.axis_index("block") * tiling.pieces
        for i in range(tiling.pieces):
            tile, row, column = place(first + i)
            source = pl.ds(first_row + tile * page_tokens + row, tiling.rows), pl.ds(column, tiling.columns)
            plgpu.copy_gmem_to_smem(values.at[source], staged.at[i], loaded.at[i])
        for i in range(tiling.pieces):
            tile, row, column = place(first + i)
            page = pages[tile, lax.div(column, width)]
            plgpu.barrier_wait(loaded.at[i])

            @pl.when((first + i < count) & (page >= 0) & (page < pool_pages))
            def _store(i=i, page=page, row=row, column=column):
                target = pl.ds(row, tiling.rows), pl.ds(lax.rem(column, width), tiling.columns)
                plgpu.copy_smem_to_gmem(staged.at[i], pool.at[layer[0], page, *target])

        plgpu.wait_smem_to_gmem(0)

    staged = (tiling.pieces, tiling.rows, tiling.columns)
    run = _blocks(body, "write_pages", pl.cdiv(count, tiling.pieces), staged, values.dtype, interpret)
    return _in_place(run, pool, layer, values, pages)


def _check_row(operation, width, dtype):
    if width * dtype.itemsize % COPY_BYTES:
        raise ValueError(
            f"{operation}: the Mosaic GPU kernel copies rows of multiples of {COPY_BYTES} bytes, not {width} {dtype}"
        )


def _blocks(body, name, blocks, staged, dtype, interpret):
    """A kernel of this many blocks, each with room for ``staged`` values and a barrier for each of its copies."""
    scratch = (plgpu.SMEM(staged, dtype), plgpu.Barrier(num_barriers=staged[0]))
    grid = {"grid": (max(1, blocks),), "grid_names": ("block",)}
    return plgpu.kernel(body, out_type=(), scratch_types=scratch, interpret=interpret, kernel_name=name, **grid)


def _in_place(run, pool, layer, values, places):
    """The pool after the kernel wrote into it; the same memory where the pool is donated."""
    if not places.size or not values.size:
        return pool
    written = jax.new_ref(pool)
    run(written, *whole(values, places.astype(jnp.int32), jnp.asarray(layer, jnp.int32).reshape(1)))
    return jax.freeze(written)
