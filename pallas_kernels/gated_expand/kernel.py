"""The gated expansion on a Hopper GPU: gate and up go into shared memory once, and h comes out.

A thread block takes items side by side and keeps B of their columns in shared memory. Its last warpgroup loads (see
``load``), the others compute, each its share of an item's columns (see ``compute``).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.gated_expand.compute import compute_items
from pallas_kernels.gated_expand.items import Shape
from pallas_kernels.gated_expand.load import load_items
from pallas_kernels.gated_expand.memory import Arrays, Shared, shared_memory
from pallas_kernels.gated_expand.tiling import Tiling, tiling_for
from pallas_kernels.lora_expand.plan import Plan, plan_slots
from pallas_kernels.lora_expand.tiling import MAX_RANK

WIDTH_STEP = 64
"""Widths that the kernel takes are multiples of it."""


def gated_expand(
    y,
    low,
    b,
    layer,
    indices,
    owner,
    scale,
    kept,
    *,
    plan: Plan | None = None,
    tiling: Tiling | None = None,
    interpret=None,
):
    """See ``api.gated_expand``."""
    _check(y, low, b)
    slots, (_, rank, out) = y.shape[0], b.shape
    low_dtype, low_after = (y.dtype, out) if low is None else (low.dtype, 0)
    tiling = tiling or tiling_for(slots, rank, out // 2, low_dtype.itemsize)
    shape = Shape(slots, rank, out // 2, tiling, low_after, interpret is not None)
    layer, kept = jnp.reshape(jnp.asarray(layer, jnp.int32), 1), None if kept is None else kept.astype(jnp.int32)
    lows, kepts = [each for each in (low,) if each is not None], [each for each in (kept,) if each is not None]
    y, *others = mosaic.whole(y, *lows, *kepts, b, layer, *(plan or plan_slots(indices, owner, scale)))
    run = plgpu.kernel(
        _block_of(shape, bool(lows), bool(kepts)),
        out_type=jax.ShapeDtypeStruct((slots, shape.width), y.dtype),
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=tiling.workers + 1,
        thread_name="warpgroup",
        scratch_types=shared_memory(shape, y.dtype, low_dtype),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="gated_expand",
    )
    if kept is None:
        return run(y, *others), y
    updated = jax.new_ref(y)
    h = run(updated, *others)
    return h, jax.freeze(updated)


def _check(y, low, b):
    if y.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"gated_expand: y is {y.dtype}; the kernel takes bfloat16 and float16")
    if b.dtype != y.dtype:
        raise ValueError(f"gated_expand: b is {b.dtype}, y is {y.dtype}; the kernel takes one dtype for both")
    if low is not None and low.dtype not in (jnp.float32, y.dtype):
        raise ValueError(f"gated_expand: low is {low.dtype}, y is {y.dtype}; the kernel takes y's dtype or float32")
    if b.shape[2] // 2 % WIDTH_STEP:
        raise ValueError(f"gated_expand: a width of {b.shape[2] // 2}; the kernel takes multiples of {WIDTH_STEP}")
    if b.shape[1] > MAX_RANK:
        raise ValueError(f"gated_expand: a rank axis of {b.shape[1]} columns; the kernel takes up to {MAX_RANK}")


def _block_of(shape, has_low, has_kept):
    """What a thread block does."""

    def block(*refs, **shared):
        (y, *refs), shared = refs, Shared(**shared)
        low, kept = refs.pop(0) if has_low else y, refs.pop(0) if has_kept else None
        arrays, warpgroup = Arrays(y, low, kept, *refs), lax.axis_index("warpgroup")
        loader = shape.tiling.workers
        pl.when(warpgroup == loader)(lambda: load_items(shape, arrays, shared))
        pl.when(warpgroup < loader)(lambda: compute_items(shape, arrays, shared, warpgroup))

    return block
