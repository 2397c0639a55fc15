"""The thin row product: the thread blocks that split its inputs are a cluster, and add up in the kernel.

Each leaves its sums where the others of its cluster read them, in memory; then each adds up some of the rows:

    4 blocks       rows 0 .. 15 | 16 .. 31 | 32 .. 47 | 48 .. 63     of the sums of blocks 0, 1, 2, 3, in this order
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import fence
from pallas_kernels.row_product.stream import (
    LOADER,
    MULTIPLIER,
    ROW_UNIT,
    Ring,
    load_all,
    ring_memory,
    share_of,
    summed,
)
from pallas_kernels.row_product.tiling import ROWS, Tiling


def joined_product(x, weights, layer, tiling: Tiling, dtype, interpret):
    """[1, rows, outputs] in ``dtype``; x of a multiple of 8 rows."""
    rows, inputs = x.shape
    outputs = weights.shape[2]
    own_rows, columns = ROWS // tiling.splits, tiling.columns

    def body(x, weights, layer, out, parts, *, ring, own, met):
        share, ring = share_of(rows, inputs, tiling), Ring(**ring)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOADER)(lambda: load_all(share, x, weights, layer[0], ring))

        @pl.when(warpgroup == MULTIPLIER)
        def _():
            parts_of_columns = parts.at[lax.axis_index("column")]
            _leave(share, ring, parts_of_columns)
            _meet(met, interpreted=interpret is not None)
            _add_own_rows(share, parts_of_columns, own, out)

    out, _ = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, outputs), dtype),
            jax.ShapeDtypeStruct((outputs // columns, tiling.splits, ROWS, columns), jnp.float32),
        ),
        grid=(outputs // columns,),
        grid_names=("column",),
        cluster=(tiling.splits,),
        cluster_names=("split",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={
            "ring": ring_memory(tiling, x.dtype),
            "own": plgpu.SMEM((own_rows, columns), dtype),
            "met": plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=1),
        },
        interpret=interpret,
        kernel_name="row_product_joined",
    )(x, weights, jnp.reshape(jnp.asarray(layer, jnp.int32), 1))
    return out[None]


def _leave(share, ring: Ring, parts):
    """Written by the threads, not by the copy engine: of their own writes a fence makes sure that others see them."""
    plgpu.set_max_registers(232, action="increase")
    parts[share.split] = pl.run_scoped(functools.partial(summed, share, ring), plgpu.ACC(parts.shape[1:], jnp.float32))


def _meet(met, *, interpreted: bool):
    """Until all thread blocks of the cluster are here, and see what each wrote."""
    if not interpreted:
        fence()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # so that no thread signals before all have written
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    if not interpreted:
        fence()


def _add_own_rows(share, parts, own, out):
    splits, rows = parts.shape[0], own.shape[0]
    first = share.split * rows
    of = lambda split: plgpu.load(parts.at[split, pl.ds(first, rows)], optimized=False)
    own[...] = sum(map(of, range(1, splits)), of(0)).astype(own.dtype)
    plgpu.commit_smem()
    for row in range(0, rows, ROW_UNIT):

        @pl.when(first + row < share.rows)
        def _store(row=row):
            place = pl.ds(pl.multiple_of(first + row, ROW_UNIT), ROW_UNIT)
            plgpu.copy_smem_to_gmem(own.at[pl.ds(row, ROW_UNIT)], out.at[place, share.columns])

    plgpu.wait_smem_to_gmem(0)
