"""Mosaic GPU (Hopper) kernel of paged attention for chunk tiles: 64 queries of one sequence a tile.

A persistent thread block takes work items (tile, K/V head, a few query heads of its group) one after the other. Its
last warpgroup loads; each of the others attends with the 64 queries of one head (``chunk_attend``). The heads share one
load of K and V. Blocks of keys are taken from the last to the first, so that the causal mask comes first.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import whole
from pallas_kernels.paged_attention.chunk_attend import Attend
from pallas_kernels.paged_attention.chunk_tiling import PAGE, QUERIES, Items, Tiling, tiling_for

LOADER_REGISTERS = 24
"""Registers of a thread of the warpgroup that loads."""


class ChunkPlan(NamedTuple):
    """[tiles] int32 each; the same for every layer of a step.

    Attributes:
        positions: of a tile's first query; contexts: keys that its last one sees; 0 both for an inactive tile.
        order: tiles with the longest contexts first: what is started last should be short.
    """

    positions: jax.Array
    contexts: jax.Array
    order: jax.Array


def plan_chunk(positions, lengths) -> ChunkPlan:
    """Plan for tiles at these positions with so many queries each, [tiles] int32 both."""
    first = jnp.where(lengths > 0, positions, 0).astype(jnp.int32)
    contexts = (first + lengths).astype(jnp.int32)
    return ChunkPlan(first, contexts, jnp.argsort(-contexts).astype(jnp.int32))


def paged_attention_chunk(
    q, pool, layer, tables, plan: ChunkPlan, *, kv_heads, scale, before=None, interpret=None, tiling=None
):
    """See ``api.paged_attention``, for the last tiles of q, [slots, query_heads, 64 or 128] in a 16-bit dtype, and
    scale > 0.

    Args:
        before: like q, what it holds of the slots before the tiles, a multiple of 8; written in place. None if all
            slots belong to tiles.

    Returns:
        out: like q. lse: [tiles, 64, query_heads] float32.
    """
    (slots, heads, head_size), tiles = q.shape, len(plan.contexts)
    tiling = tiling or tiling_for(heads // kv_heads)
    items = Items(tiling, tiles, slots - tiles * QUERIES, kv_heads, heads // kv_heads)
    lse = jax.ShapeDtypeStruct((tiles, QUERIES, heads), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_body, items=items, scale=scale, interpreted=interpret is not None),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), lse) if before is None else lse,
        scratch_types=_scratch(tiling, head_size, q.dtype),
        grid=(min(items.count, 2 if interpret else tiling.thread_blocks),),
        grid_names=("block",),
        num_threads=tiling.heads + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_attention_chunk",
    )
    layer = jnp.reshape(layer, 1)
    if before is None:
        return kernel(q, pool, layer, tables, *plan)
    q, layer, tables, *plan = whole(q, layer, tables, *plan)
    out = jax.new_ref(before)
    lse = kernel(q, pool, layer, tables, *plan, out)
    return jax.freeze(out), lse


def _scratch(tiling: Tiling, head_size: int, dtype) -> dict:
    """Shared memory and barriers of a thread block. Every barrier counts warpgroups or copies."""
    tile = plgpu.SMEM((tiling.heads, QUERIES, head_size), dtype)
    blocks = plgpu.SMEM((tiling.stages, tiling.keys, head_size), dtype)
    loaded = plgpu.Barrier(num_arrivals=tiling.pages, num_barriers=tiling.stages)
    read = plgpu.Barrier(num_arrivals=tiling.heads, num_barriers=tiling.stages)
    all_heads = plgpu.Barrier(num_arrivals=tiling.heads)
    return {
        "q_tile": tile,
        "keys": blocks,
        "values": blocks,
        "out_tile": tile,
        "q_loaded": all_heads,
        "q_read": all_heads,
        "keys_loaded": loaded,
        "keys_read": read,
        "values_loaded": loaded,
        "values_read": read,
        "tail_cleared": all_heads,
        "columns": plgpu.SMEM((tiling.heads, tiling.keys), jnp.int32),
    }


def _body(q, pool, layer, tables, positions, contexts, order, out, lse, *, items, scale, interpreted, **scratch):
    items = replace(items, positions=positions, contexts=contexts, order=order)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == items.tiling.heads)
    def _load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        _load_items(items, q, pool, layer[0], tables, scratch)

    @pl.when(warpgroup < items.tiling.heads)
    def _attend():
        plgpu.set_max_registers(items.tiling.registers, action="increase")
        Attend(items, out, lse, scale * math.log2(math.e), interpreted, warpgroup, **scratch).run()


def _load_items(items, q, pool, layer, tables, scratch):
    """Keeps the stages full: queries of an item, and its blocks of keys and values from the last to the first."""
    tiling, head_size = items.tiling, q.shape[-1]

    def load_q(item, step):
        pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch["q_read"]))
        for i in range(tiling.heads):
            head = lax.min(item.first_head + i, item.kv_head * items.group + items.group - 1)
            plgpu.copy_gmem_to_smem(q.at[item.slots, head], scratch["q_tile"].at[i], scratch["q_loaded"])

    def load_block(item, block, step, name, column):
        slot = lax.rem(step, tiling.stages)
        pl.when(step >= tiling.stages)(lambda: plgpu.barrier_wait(scratch[f"{name}_read"].at[slot]))
        last = lax.div(item.context - 1, PAGE)
        for i in range(tiling.pages):  # a page beyond the context is not there: take the last one again
            page = tables[item.tile, lax.min(block * tiling.pages + i, last)]
            rows = pool.at[layer, page, :, pl.ds(pl.multiple_of(column * head_size, head_size), head_size)]
            place = scratch[name].at[slot, pl.ds(i * PAGE, PAGE)]
            plgpu.copy_gmem_to_smem(rows, place, scratch[f"{name}_loaded"].at[slot])

    def load_item(item, step):
        def load_keys_and_values(i, step):
            block = item.blocks - 1 - i
            load_block(item, block, step, "keys", item.kv_head)
            pl.when(i == 0)(lambda: load_q(item, step))
            load_block(item, block, step, "values", items.kv_heads + item.kv_head)
            return step + 1

        return lax.fori_loop(0, item.blocks, load_keys_and_values, step)

    steps = items.for_each(load_item, jnp.int32(0))
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(scratch["q_read"]))

    @pl.loop(lax.max(steps - tiling.stages, 0), steps)
    def _drain(step):
        plgpu.barrier_wait(scratch["keys_read"].at[lax.rem(step, tiling.stages)])
        plgpu.barrier_wait(scratch["values_read"].at[lax.rem(step, tiling.stages)])
