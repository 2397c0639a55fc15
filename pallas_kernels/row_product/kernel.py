"""The row product on a Hopper GPU: weights stream through shared memory once, past a tile of all rows.

A thread block has some columns and a part of the inputs. Its first warpgroup loads weights and x, step by step; its
second multiplies. Where inputs are split, sums of the parts are written in float32 and added in a fixed order by XLA,
within whatever reads the result; so the result is the same in every run.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.row_product.tiling import COLUMN_UNIT, ROWS, STEP, Tiling, tiling_for

MULTIPLIER, LOADER = 0, 1
"""The two warpgroups."""

ROW_UNIT = 8
"""Shared memory holds tiles of this many rows."""


@dataclass(frozen=True)
class Share:
    """What a thread block does: ``steps`` steps of 64 inputs from ``first`` on, for its columns.

    Attributes:
        rows: of x, a multiple of 8.
        split: index of its part of the inputs.
        columns: slice of the columns.
    """

    rows: int
    split: jax.Array
    columns: pl.Slice
    first: jax.Array
    steps: jax.Array


@dataclass(frozen=True)
class Ring:
    """Shared memory of the steps in flight.

    Attributes:
        x: [stages, 64, 64]; rows that x lacks hold anything.
        weights: [stages, 64, columns].
        loaded, read: barrier per stage; x and weights have arrived, the product with them is done.
    """

    x: jax.Ref
    weights: jax.Ref
    loaded: jax.Ref
    read: jax.Ref

    @property
    def stages(self) -> int:
        return self.x.shape[0]


def row_product(x, weights, layer, residual=None, *, interpret=None, tiling: Tiling | None = None):
    """See ``api.row_product``."""
    rows = len(x)
    _check(x, weights)
    tiling = tiling or tiling_for(rows, *weights.shape[1:])
    whole = tiling.splits == 1 and residual is None
    padded = jnp.pad(x, ((0, -rows % ROW_UNIT), (0, 0)))
    parts = _parts(padded, weights, layer, tiling, x.dtype if whole else jnp.float32, interpret)[:, :rows]
    if whole:
        return parts[0]
    total = functools.reduce(jnp.add, parts)
    return (total if residual is None else total + residual.astype(jnp.float32)).astype(x.dtype)


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
        share, ring = _share(rows, inputs, tiling), Ring(**ring)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == LOADER)(lambda: _load(share, x, weights, layer[0], ring))
        pl.when(warpgroup == MULTIPLIER)(lambda: _multiply(share, ring, result, parts))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tiling.splits, rows, outputs), dtype),
        grid=(outputs // tiling.columns, tiling.splits),
        grid_names=("column", "split"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=_shared(tiling, x.dtype, dtype),
        interpret=interpret,
        kernel_name="row_product",
    )(x, weights, jnp.reshape(jnp.asarray(layer, jnp.int32), 1))


def _shared(tiling: Tiling, dtype, result_dtype) -> dict:
    stages, size = tiling.stages, jnp.dtype(result_dtype).itemsize

    def tiled(row_bytes, itemsize):
        return plgpu.TilingTransform((ROW_UNIT, row_bytes // itemsize)), plgpu.SwizzleTransform(row_bytes)

    operand = tiled(tiling.swizzle, jnp.dtype(dtype).itemsize)
    return {
        "ring": {
            "x": plgpu.SMEM((stages, ROWS, STEP), dtype, transforms=operand),
            "weights": plgpu.SMEM((stages, STEP, tiling.columns), dtype, transforms=operand),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "read": plgpu.Barrier(num_barriers=stages),
        },
        "result": plgpu.SMEM((ROWS, tiling.columns), result_dtype, transforms=tiled(32 * size, size)),
    }


def _share(rows: int, inputs: int, tiling: Tiling) -> Share:
    """Parts differ by one step at most; 7 steps in 3 parts are steps 0 1 | 2 3 | 4 5 6."""
    column, split = lax.axis_index("column"), lax.axis_index("split")
    start = lambda split: lax.div(split * (inputs // STEP), tiling.splits)
    columns = pl.ds(pl.multiple_of(column * tiling.columns, tiling.columns), tiling.columns)
    return Share(rows, split, columns, start(split), start(split + 1) - start(split))


def _load(share: Share, x, weights, layer, ring: Ring):
    plgpu.set_max_registers(40, action="decrease")

    def load(step, _):
        slot = lax.rem(step, ring.stages)
        pl.when(step >= ring.stages)(lambda: plgpu.barrier_wait(ring.read.at[slot]))
        inputs = pl.ds(pl.multiple_of((share.first + step) * STEP, STEP), STEP)
        loaded = ring.loaded.at[slot]
        plgpu.copy_gmem_to_smem(weights.at[layer, inputs, share.columns], ring.weights.at[slot], loaded)
        plgpu.copy_gmem_to_smem(x.at[:, inputs], ring.x.at[slot, pl.ds(0, share.rows)], loaded)

    lax.fori_loop(0, share.steps, load, None)
    wait = lambda step, _: plgpu.barrier_wait(ring.read.at[lax.rem(step, ring.stages)])
    lax.fori_loop(lax.max(share.steps - ring.stages, 0), share.steps, wait, None)


def _multiply(share: Share, ring: Ring, result, parts):
    plgpu.set_max_registers(232, action="increase")
    total = pl.run_scoped(functools.partial(_summed, share, ring), plgpu.ACC(result.shape, jnp.float32))
    result[...] = total.astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result.at[pl.ds(0, share.rows)], parts.at[share.split, :, share.columns])
    plgpu.wait_smem_to_gmem(0)


def _summed(share: Share, ring: Ring, sums):
    """[64, columns] float32; each step's slot is released while the next one's product runs."""

    def release(step):
        pl.when(step >= 0)(lambda: plgpu.barrier_arrive(ring.read.at[lax.rem(step, ring.stages)]))

    def multiply(step, _):
        slot = lax.rem(step, ring.stages)
        plgpu.barrier_wait(ring.loaded.at[slot])
        plgpu.wgmma(sums, ring.x.at[slot], ring.weights.at[slot])
        plgpu.wgmma_wait(1)
        release(step - 1)

    lax.fori_loop(0, share.steps, multiply, None)
    total = sums[...]
    release(share.steps - 1)
    return total
