"""The row product on a Hopper GPU: weights stream through shared memory once, past a tile of all rows.

A thread block has some columns and a part of the inputs. Its first warpgroup loads weights and x, step by step; its
second multiplies. Where inputs are split, sums of the parts are written in float32 and added in a fixed order: by XLA,
within whatever reads the result, or by the thread blocks of a cluster (`joined`). So the result is the same in every
run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.row_product.joined import joined_product
from pallas_kernels.row_product.stream import (
    LOADER,
    MULTIPLIER,
    ROW_UNIT,
    Ring,
    load_all,
    ring_memory,
    share_of,
    summed,
    tiled,
)
from pallas_kernels.row_product.tiling import COLUMN_UNIT, PREFERRED_UNIT, ROWS, STEP, Tiling, tiling_for


def row_product(x, weights, layer, residual=None, *, dtype=None, interpret=None, tiling: Tiling | None = None):
    """See ``api.row_product``."""
    rows, dtype = len(x), jnp.dtype(dtype or x.dtype)
    _check(x, weights)
    if tiling is None:  # the interpreter runs the warpgroups of a cluster all at once, too many for it
        tiling = tiling_for(rows, *weights.shape[1:], may_join=interpret is None)
    whole = residual is None and (tiling.joined or tiling.splits == 1)
    padded = jnp.pad(x, ((0, -rows % ROW_UNIT), (0, 0)))
    make = joined_product if tiling.joined else _parts
    parts = make(padded, weights, layer, tiling, dtype if whole else jnp.float32, interpret)[:, :rows]
    if whole:
        return parts[0]
    total = functools.reduce(jnp.add, parts)
    return (total if residual is None else total + residual.astype(jnp.float32)).astype(dtype)


def _check(x, weights):
    """Raises ValueError for what the kernel does not take."""
    _, inputs, outputs = weights.shape
    if jnp.dtype(x.dtype).itemsize != 2:
        raise ValueError(f"row_product: the kernel takes 16-bit dtypes; x and the weights are {x.dtype}")
    if not 1 <= len(x) <= ROWS:
        raise ValueError(f"row_product: the kernel takes 1 to {ROWS} rows; x has {len(x)}")
    if inputs % STEP:
        raise ValueError(f"row_product: the kernel takes inputs that are a multiple of {STEP}; there are {inputs}")
    if outputs % COLUMN_UNIT:
        raise ValueError(
            f"row_product: the kernel takes outputs that are a multiple of {COLUMN_UNIT}; there are {outputs}"
        )


def _parts(x, weights, layer, tiling: Tiling, dtype, interpret):
    """[splits, rows, outputs], of which the product is the sum; x of a multiple of 8 rows."""
    rows, inputs = x.shape
    outputs = weights.shape[2]

    def body(x, weights, layer, parts, *, result, ring):
        share, ring = share_of(rows, inputs, tiling), Ring(**ring)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOADER)(lambda: load_all(share, x, weights, layer[0], ring))
        pl.when(warpgroup == MULTIPLIER)(lambda: _multiply(share, ring, result, parts))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiling.splits, rows, outputs), dtype),
        grid=(outputs // tiling.columns, tiling.splits),
        grid_names=("column", "split"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types={"ring": ring_memory(tiling, x.dtype), "result": _result_memory(tiling, dtype)},
        interpret=interpret,
        kernel_name="row_product",
    )(x, weights, jnp.reshape(jnp.asarray(layer, jnp.int32), 1))


def _result_memory(tiling: Tiling, dtype):
    size, unit = jnp.dtype(dtype).itemsize, COLUMN_UNIT if tiling.columns % PREFERRED_UNIT else PREFERRED_UNIT
    return plgpu.SMEM((ROWS, tiling.columns), dtype, transforms=tiled(unit * size, size))


def _multiply(share, ring: Ring, result, parts):
    plgpu.set_max_registers(232, action="increase")
    total = pl.run_scoped(functools.partial(summed, share, ring), plgpu.ACC(result.shape, jnp.float32))
    result[...] = total.astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result.at[pl.ds(0, share.rows)], parts.at[share.split, :, share.columns])
    plgpu.wait_smem_to_gmem(0)
