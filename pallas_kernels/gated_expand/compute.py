"""A computing warpgroup: masks and scales low, multiplies it with B, adds to its share of gate and up, writes h.

Gate and up are written back where they are kept; else what was read of them is dropped.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.gated_expand.items import for_own_items
from pallas_kernels.gated_expand.load import MODULES
from pallas_kernels.lora_expand.items import copy_rows
from pallas_kernels.lora_expand.plan import TILE


def compute_items(shape, arrays, shared, worker):
    tiling = shape.tiling

    def compute(item):
        @pl.when(item.needs_strip)
        def _():
            before = lax.rem(item.strips + tiling.b_places - 1, tiling.b_places)
            pl.when(item.strips > 0)(lambda: plgpu.barrier_arrive(shared.b_read.at[before]))
            plgpu.barrier_wait(shared.b_loaded.at[lax.rem(item.strip, tiling.b_places)])

        stage = lax.rem(item.items, tiling.stages)
        plgpu.barrier_wait(shared.y_loaded.at[stage])
        gate, up = _expanded(shape, shared, item, stage, worker)
        _leave(shape, arrays, shared, item, stage, worker, gate, up)
        plgpu.barrier_arrive(shared.y_read.at[stage])

    for_own_items(shape, arrays.pieces, compute)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _expanded(shape, shared, item, stage, worker):
    """Gate and up with what the slots' adapters add, [64, part] each in y's dtype."""
    expanded = []
    for module, total in zip(MODULES, _added(shape, shared, item, stage, worker), strict=True):
        old = plgpu.load(shared.y.at[stage, shape.share(module, worker)], layout=mosaic.WGMMA)
        expanded.append((old.astype(jnp.float32) + total).astype(old.dtype))
    return expanded


def _added(shape, shared, item, stage, worker):
    """What is added to gate and to up, [64, part] float32 each; 0 for slots without an adapter."""
    per_row = lambda values: lax.broadcast_in_dim(values, (TILE, shape.piece), [0])
    adapter = plgpu.load(shared.slots.at[stage], layout=mosaic.PER_ROW)
    scale = per_row(plgpu.load(shared.scale.at[stage], layout=mosaic.PER_ROW))
    strip = lax.rem(lax.max(item.strip, 0), shape.tiling.b_places)

    def add_piece(i, totals):
        piece, place = item.first + i, lax.rem(item.pieces + i, shape.tiling.ring)
        plgpu.barrier_wait(shared.low_loaded.at[place])
        lows = [plgpu.load(shared.low.at[place, module], layout=mosaic.WGMMA) for module in MODULES]
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.low_read.at[place])
        owner = plgpu.load(shared.owner.at[strip, piece], layout=mosaic.PER_COLUMN)
        own = per_row(adapter) == lax.broadcast_in_dim(owner, (TILE, shape.piece), [1])
        scaled = lambda low: jnp.where(own, low.astype(jnp.float32) * scale, 0.0).astype(shared.b.dtype)
        b = shared.b.at[strip, piece]
        terms = [(totals[module], scaled(lows[module]), b.at[shape.share(module, worker)]) for module in MODULES]
        return tuple(mosaic.products(terms, interpreted=shape.interpreted))

    nothing = plgpu.layout_cast(jnp.zeros((TILE, shape.tiling.part), jnp.float32), mosaic.WGMMA)
    return lax.fori_loop(0, item.count, add_piece, (nothing, nothing))


def gated(gate, up):
    """silu(gate) * up, every step rounded as the compiler rounds ``jax.nn.silu(gate) * up``. 1 / (1 + e) rounds like
    the square of a reciprocal root, which is an instruction. The sign changes in 16 bits: else LLVM rounds gate value
    by value, with an instruction as slow as the root."""
    exponential = jnp.exp((-gate).astype(jnp.float32)).astype(gate.dtype)
    root = lax.rsqrt((exponential + jnp.ones_like(exponential)).astype(jnp.float32))
    return gate * (root * root).astype(gate.dtype) * up


def _leave(shape, arrays, shared, item, stage, worker, gate, up):
    """Sends h, and of gate and up what is kept; returns when nothing of the stage is needed."""
    kept = [] if arrays.kept is None else [arrays.kept[item.tile, module] > 0 for module in MODULES]
    places = [shared.y.at[stage, shape.share(module, worker)] for module in MODULES]
    for wanted, place, value in zip(kept, places, (gate, up), strict=False):
        pl.when(wanted)(functools.partial(_put, place, value))
    h = gated(gate, up)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # h of the item before
    _put(shared.h.at[worker], h)
    plgpu.commit_smem()
    columns = pl.ds(item.column + worker * shape.tiling.part, shape.tiling.part)
    _send(shape, item, shared.h.at[worker], arrays.h, columns)
    for module, wanted in enumerate(kept):
        to = arrays.y, shape.columns(item, module, worker)
        pl.when(wanted)(functools.partial(_send, shape, item, places[module], *to))
    if kept:
        pl.when(kept[0] | kept[1])(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))


def _put(place, value):
    place[...] = value


def _send(shape, item, place, array, columns):
    """The tile's slots of shared memory into columns of an array."""
    send = lambda slots, rows: plgpu.copy_smem_to_gmem(place.at[rows], array.at[slots, columns])
    copy_rows(shape, item.tile, send)
