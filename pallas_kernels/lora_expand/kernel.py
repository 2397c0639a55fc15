"""The low-rank expansion on a Hopper GPU: the tiles of y that an adapter touches go through shared memory once.

A thread block takes items side by side and keeps B of their columns in shared memory. Its first warpgroup loads: B when
the columns change, y, and those pieces of low's rank axis that the tile's adapters own. Its second masks and scales the
pieces, multiplies them with B, adds to the tile of y in place and sends it back. With a residual all tiles go through
shared memory, each beside its tile of the residual, and their sums are a result of their own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.lora_expand.items import Shape, copy_rows, for_own_items
from pallas_kernels.lora_expand.memory import Inputs, Shared, shared_memory
from pallas_kernels.lora_expand.plan import TILE, Plan, plan_slots
from pallas_kernels.lora_expand.tiling import MAX_RANK, PART, Tiling, tiling_for

LOADER, COMPUTER = 0, 1
"""The two warpgroups."""


def lora_expand(
    y,
    low,
    b,
    layer,
    indices,
    owner,
    scale,
    *,
    widths,
    residual=None,
    plan: Plan | None = None,
    tiling: Tiling | None = None,
    interpret=None,
):
    """See ``api.lora_expand``."""
    _check(y, low, b, widths, residual)
    (slots, _), (_, rank, out), has_residual = y.shape, b.shape, residual is not None
    tiling = tiling or tiling_for(slots, rank, widths, has_residual)
    low_after = 0 if low is not None else out
    shape = Shape(slots, rank, widths, tiling, interpret is not None, low_after, has_residual)
    layer = jnp.reshape(jnp.asarray(layer, jnp.int32), 1)
    given = [each for each in (residual, low) if each is not None]
    y, *arrays = mosaic.whole(y, *given, b, layer, *(plan or plan_slots(indices, owner, scale)))
    run = plgpu.kernel(
        _block_of(shape),
        out_type=jax.ShapeDtypeStruct((slots, out), y.dtype) if has_residual else (),
        grid=(shape.blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=shared_memory(shape, y.dtype, y.dtype if low is None else low.dtype),
        interpret=interpret,
        kernel_name="lora_expand",
    )
    if has_residual:
        return run(y, *arrays)
    updated = jax.new_ref(y)
    run(updated, *arrays)
    return jax.freeze(updated)


def _block_of(shape):
    """What a thread block does."""

    def block(*refs, **shared):
        (y, *refs), shared = refs, Shared(**shared)
        residual, result = (refs.pop(0), refs.pop()) if shape.residual else (None, y)
        low = y if shape.low_after else refs.pop(0)
        inputs, warpgroup = Inputs(y, residual, result, low, *refs), lax.axis_index("warpgroup")
        pl.when(warpgroup == LOADER)(lambda: _load(shape, inputs, shared))
        pl.when(warpgroup == COMPUTER)(lambda: _compute(shape, inputs, shared))

    return block


def _check(y, low, b, widths, residual):
    if y.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"lora_expand: y is {y.dtype}; the kernel takes bfloat16 and float16")
    if b.dtype != y.dtype:
        raise ValueError(f"lora_expand: b is {b.dtype}, y is {y.dtype}; the kernel takes one dtype for both")
    if low is not None and low.dtype not in (jnp.float32, y.dtype):
        raise ValueError(f"lora_expand: low is {low.dtype}, y is {y.dtype}; the kernel takes y's dtype or float32")
    if residual is not None and residual.dtype != y.dtype:
        raise ValueError(f"lora_expand: residual is {residual.dtype}, y is {y.dtype}; the kernel takes one dtype")
    if any(width % PART for width in widths):
        raise ValueError(f"lora_expand: widths {widths} are not all multiples of {PART}, as the kernel needs")
    if b.shape[1] > MAX_RANK:
        raise ValueError(f"lora_expand: a rank axis of {b.shape[1]} columns; the kernel takes up to {MAX_RANK}")


def _load(shape, inputs, shared):
    stages, ring = shape.tiling.stages, shape.tiling.ring

    def load(item):
        @pl.when(item.starts_columns)
        def _():
            pl.when(item.column_before >= 0)(lambda: plgpu.barrier_wait(shared.b_read))
            _load_b(shape, inputs, shared, item.column)

        stage = lax.rem(item.items, stages)
        pl.when(item.items >= stages)(lambda: plgpu.barrier_wait(shared.y_stored.at[stage]))
        _load_y(shape, inputs, shared, item, stage)

        def load_low(i, _):
            place = lax.rem(item.pieces + i, ring)
            pl.when(item.pieces + i >= ring)(lambda: plgpu.barrier_wait(shared.low_read.at[place]))
            _load_low(shape, inputs, shared, item, item.first + i, place)

        lax.fori_loop(0, item.count, load_low, None)

    items, pieces = for_own_items(shape, inputs.pieces, load)
    for used, total, places in ((shared.y_stored, items, stages), (shared.low_read, pieces, ring)):
        wait = lambda i, _, used=used, places=places: plgpu.barrier_wait(used.at[lax.rem(i, places)])
        lax.fori_loop(lax.max(total - places, 0), total, wait, None)


def _load_b(shape, inputs, shared, column):
    layer = inputs.layer[0]

    def load_piece(i, _):
        rows = pl.ds(pl.multiple_of(i * shape.piece, shape.piece), shape.piece)  # beyond the rank axis they become 0
        part = inputs.b.at[layer, rows, pl.ds(column, shape.tiling.columns)]
        plgpu.copy_gmem_to_smem(part, shared.b.at[i], shared.b_loaded)

    lax.fori_loop(0, shape.pieces, load_piece, None)
    plgpu.copy_gmem_to_smem(inputs.owner, shared.owner, shared.b_loaded)


def _load_y(shape, inputs, shared, item, stage):
    loaded = shared.y_loaded.at[stage]
    plgpu.copy_gmem_to_smem(inputs.slots.at[item.tile], shared.slots.at[stage], loaded)
    plgpu.copy_gmem_to_smem(inputs.scale.at[item.tile], shared.scale.at[stage], loaded)

    def copy(slots, rows):
        for part, columns in enumerate(shape.columns_of_parts(item.column)):
            plgpu.copy_gmem_to_smem(inputs.y.at[slots, columns], shared.y.at[stage, part, rows], loaded)
            if shape.residual:
                place = shared.residual.at[stage, part, rows]
                plgpu.copy_gmem_to_smem(inputs.residual.at[slots, columns], place, loaded)

    copy_rows(shape, item.tile, copy)


def _load_low(shape, inputs, shared, item, piece, place):
    first = shape.low_after + shape.module(item.column) * shape.rank
    columns = pl.ds(first + piece * shape.piece, shape.piece)

    def copy(slots, rows):
        loaded = shared.low_loaded.at[place]
        plgpu.copy_gmem_to_smem(inputs.low.at[slots, columns], shared.low.at[place, rows], loaded)

    copy_rows(shape, item.tile, copy)


def _compute(shape, inputs, shared):
    stages = shape.tiling.stages

    def compute(item):
        @pl.when(item.starts_columns)
        def _():
            pl.when(item.column_before >= 0)(lambda: plgpu.barrier_arrive(shared.b_read))
            plgpu.barrier_wait(shared.b_loaded)

        stage = lax.rem(item.items, stages)
        plgpu.barrier_wait(shared.y_loaded.at[stage])
        adapter = plgpu.load(shared.slots.at[stage], layout=mosaic.PER_ROW)
        scale = plgpu.load(shared.scale.at[stage], layout=mosaic.PER_ROW)
        residual = shared.residual.at[stage] if shape.residual else None
        _add(shared.y.at[stage], adapter, _expanded(shape, shared, item, adapter, scale), residual)
        _store(shape, inputs, shared, item, stage)

        @pl.when(item.items > 0)
        def _():
            plgpu.wait_smem_to_gmem(shape.parts, wait_read_only=True)
            plgpu.barrier_arrive(shared.y_stored.at[lax.rem(item.items - 1, stages)])

    items, _ = for_own_items(shape, inputs.pieces, compute)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    pl.when(items > 0)(lambda: plgpu.barrier_arrive(shared.y_stored.at[lax.rem(items - 1, stages)]))


def _expanded(shape, shared, item, adapter, scale):
    """What is added to the item, [64, columns] float32."""
    per_row = lambda values: lax.broadcast_in_dim(values, (TILE, shape.piece), [0])

    def add_piece(i, total):
        piece, place = item.first + i, lax.rem(item.pieces + i, shape.tiling.ring)
        plgpu.barrier_wait(shared.low_loaded.at[place])
        low = plgpu.load(shared.low.at[place], layout=mosaic.WGMMA).astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.low_read.at[place])
        owner = plgpu.load(shared.owner.at[piece], layout=mosaic.PER_COLUMN)
        own = per_row(adapter) == lax.broadcast_in_dim(owner, (TILE, shape.piece), [1])
        scaled = jnp.where(own, low * per_row(scale), 0.0).astype(shared.b.dtype)
        return mosaic.product(total, scaled, shared.b.at[piece], interpreted=shape.interpreted)

    nothing = plgpu.layout_cast(jnp.zeros((TILE, shape.tiling.columns), jnp.float32), mosaic.WGMMA)
    return lax.fori_loop(0, item.count, add_piece, nothing)


def _add(y, adapter, total, residual):
    """Adds to the tile in shared memory, where a slot has an adapter, and then to its tile of the residual."""
    has_adapter = lax.broadcast_in_dim(adapter, (TILE, PART), [0]) > 0
    for part in range(y.shape[0]):
        old = plgpu.load(y.at[part], layout=mosaic.WGMMA)
        new = old.astype(jnp.float32) + total[:, part * PART : (part + 1) * PART]
        new = jnp.where(has_adapter, new.astype(old.dtype), old)
        if residual is not None:
            before = plgpu.load(residual.at[part], layout=mosaic.WGMMA).astype(jnp.float32)
            new = (before + new.astype(jnp.float32)).astype(old.dtype)
        y[part] = new
    plgpu.commit_smem()


def _store(shape, inputs, shared, item, stage):
    def copy(slots, rows):
        for part, columns in enumerate(shape.columns_of_parts(item.column)):
            plgpu.copy_smem_to_gmem(shared.y.at[stage, part, rows], inputs.result.at[slots, columns])

    copy_rows(shape, item.tile, copy)
