"""The stream of a row product: what a thread block loads, and its product of all that comes, step by step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.row_product.tiling import ROWS, STEP, Tiling

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


def ring_memory(tiling: Tiling, dtype) -> dict:
    """What the fields of ``Ring`` are made of."""
    stages, operand = tiling.stages, tiled(tiling.swizzle, jnp.dtype(dtype).itemsize)
    return {
        "x": plgpu.SMEM((stages, ROWS, STEP), dtype, transforms=operand),
        "weights": plgpu.SMEM((stages, STEP, tiling.columns), dtype, transforms=operand),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "read": plgpu.Barrier(num_barriers=stages),
    }


def tiled(row_bytes: int, itemsize: int) -> tuple:
    return plgpu.TilingTransform((ROW_UNIT, row_bytes // itemsize)), plgpu.SwizzleTransform(row_bytes)


def share_of(rows: int, inputs: int, tiling: Tiling) -> Share:
    """Parts differ by one step at most; 7 steps in 3 parts are steps 0 1 | 2 3 | 4 5 6."""
    column, split = lax.axis_index("column"), lax.axis_index("split")
    start = lambda split: lax.div(split * (inputs // STEP), tiling.splits)
    columns = pl.ds(pl.multiple_of(column * tiling.columns, tiling.columns), tiling.columns)
    return Share(rows, split, columns, start(split), start(split + 1) - start(split))


def load_all(share: Share, x, weights, layer, ring: Ring):
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


def summed(share: Share, ring: Ring, sums):
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
