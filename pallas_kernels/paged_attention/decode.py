"""Mosaic GPU (Hopper) kernel of paged attention for decode rows: one query a tile.

Thread blocks stay resident and share all blocks of keys evenly (``plan``). The query heads of a group are the rows of
one tensor-core product, so K and V are read once. Where one worker has all of a row and head it writes the result;
otherwise it writes its part, and ``merge`` joins the parts.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PER_ROW, WGMMA, product, whole
from pallas_kernels.paged_attention.decode_buffers import Ring, Tile, scratch_types
from pallas_kernels.paged_attention.merge import Results, await_parts, finish_chain, merge
from pallas_kernels.paged_attention.plan import Piece, Plan, for_each_piece
from pallas_kernels.paged_attention.tiling import GROUP, KEYS, LOWEST, ROWS, TILINGS, Tiling


@functools.partial(jax.jit, static_argnames=("kv_heads", "scale", "interpret", "tiling"))  # lowered once, not per layer
def paged_attention_decode(q, pool, layer, tables, plan: Plan, *, kv_heads, scale, interpret=None, tiling=None):
    """See ``api.paged_attention``, for the first rows of q, [slots, query_heads, 64 or 128] in a 16-bit dtype.

    Returns:
        out: like q; what lies behind the rows is not written. lse: [rows, query_heads] float32.
    """
    slots, heads, head_size = q.shape
    rows, group, workers = len(plan.contexts), heads // kv_heads, len(plan.work)
    tiling = tiling or TILINGS[head_size]
    values = functools.partial(jax.ShapeDtypeStruct, dtype=q.dtype)
    logarithms = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_body, tiling=tiling, scale=scale, interpreted=interpret is not None),
        out_type=(
            values((slots, kv_heads, group, head_size)),
            logarithms((rows, kv_heads, GROUP)),
            values((2, workers, 2, GROUP, head_size)),
            logarithms((2, workers, GROUP)),
        ),
        scratch_types=scratch_types(tiling, head_size, q.dtype),
        grid=(workers // tiling.streams,),
        grid_names=("block",),
        num_threads=2 * tiling.streams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="paged_attention_decode",
    )
    q_of_heads, layer, tables, *work = whole(
        q.reshape(slots, kv_heads, group, head_size), jnp.reshape(layer, 1), tables, *plan
    )
    results = kernel(q_of_heads, pool, layer, tables, *work)
    out, lse = merge(*results, plan.chains, interpret=interpret) if interpret else results[:2]
    return out.reshape(q.shape), lse[..., :group].reshape(rows, heads)


def _body(q, pool, layer, tables, *refs, tiling: Tiling, scale, interpreted, **scratch):
    """What each warpgroup does: the first ``streams`` compute, the others load for them."""
    plan, results = Plan(*refs[:4]), Results(*refs[4:])
    warpgroup = lax.axis_index("warpgroup")
    stream = lax.rem(warpgroup, tiling.streams)
    worker = lax.axis_index("block") * tiling.streams + stream
    ring = Ring(stream * tiling.stages, tiling.stages, **scratch["ring"])
    fold = functools.partial(for_each_piece, plan, worker, q.shape[1])

    @pl.when(warpgroup >= tiling.streams)
    def _():
        plgpu.set_max_registers(tiling.loading_registers, action="decrease")
        steps = fold(lambda piece, step: _load(piece, step, pool, layer, tables, q.shape[1], ring), jnp.int32(0))
        ring.drain(steps)

    @pl.when(warpgroup < tiling.streams)
    def _():
        plgpu.set_max_registers(tiling.computing_registers, action="increase")
        tile = Tile(**{name: ref.at[stream] for name, ref in scratch["tile"].items()})

        def run(piece, step):
            queries = tile.load(q.at[piece.row, piece.head])
            step, out, lse = _attend(piece, step, queries, ring, scale=scale, interpreted=interpreted)
            _write(piece, plan.chains[worker, 2], out, lse, tile, results)
            return step

        fold(run, jnp.int32(0))
        pl.when(stream == 0)(lambda: _clear_inactive(plan.contexts, tile, results))
        plgpu.wait_smem_to_gmem(0)
        if not interpreted:
            await_parts(plan.chains, worker)
            finish_chain(plan.chains, worker, results, tile)
            plgpu.wait_smem_to_gmem(0)


def _load(piece: Piece, step, pool, layer, tables, kv_heads: int, ring: Ring):
    """Loads the blocks of K and V of a piece; ``step`` counts the blocks of this stream."""
    head_size = ring.keys.shape[-1]

    def load_block(index, step):
        slot = ring.free_slot(step)
        page = tables[piece.row, piece.block + index]
        for target, column in ((ring.keys, piece.head), (ring.values, kv_heads + piece.head)):
            columns = pl.ds(pl.multiple_of(column * head_size, head_size), head_size)
            plgpu.copy_gmem_to_smem(pool.at[layer[0], page, :, columns], target.at[slot], ring.loaded.at[slot])
        return step + 1

    return lax.fori_loop(0, piece.blocks, load_block, step)


def _attend(piece: Piece, step, queries, ring: Ring, *, scale, interpreted: bool):
    """Online softmax over the blocks of a piece (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).

    Returns:
        step, out [64, head_size] float32, and lse [64] float32, the logarithm to base 2.
    """
    dot = functools.partial(product, interpreted=interpreted)

    def attend_to_block(index, carry, *, partial: bool):
        weighted, highest, total, step = carry
        slot = ring.loaded_slot(step)
        seen = piece.context - (piece.block + index) * KEYS
        scores = dot(None, queries, ring.keys.at[slot].T) * (scale * math.log2(math.e))
        if partial:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
            scores = jnp.where(key < seen, scores, LOWEST)
            ring.clear_values(slot, seen)
        new_highest = jnp.maximum(highest, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_highest, scores.shape, [0]))
        decay = jnp.exp2(highest - new_highest)
        total = total * decay + weights.sum(axis=1)
        weighted = weighted * lax.broadcast_in_dim(decay, weighted.shape, [0])
        weighted = dot(weighted, weights.astype(queries.dtype), ring.values.at[slot])
        ring.release(slot)
        return weighted, new_highest, total, step + 1

    per_row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), PER_ROW)
    zeros = plgpu.layout_cast(jnp.zeros(queries.shape, jnp.float32), WGMMA)
    full = lax.min(lax.div(piece.context, KEYS) - piece.block, piece.blocks)
    carry = (zeros, per_row(LOWEST), per_row(0.0), step)
    carry = lax.fori_loop(0, full, functools.partial(attend_to_block, partial=False), carry)
    carry = lax.fori_loop(full, piece.blocks, functools.partial(attend_to_block, partial=True), carry)
    weighted, highest, total, step = carry
    return step, weighted / lax.broadcast_in_dim(total, weighted.shape, [0]), highest + jnp.log2(total)


def _write(piece: Piece, place, out, lse, tile: Tile, results: Results):
    """Writes a whole piece as the result; any other as a part, whose halves sum to ``out`` within 2**-16."""

    @pl.when(piece.whole)
    def _():
        tile.store(out, lse * math.log(2))
        tile.send(results.out.at[piece.row, piece.head])
        tile.send_lse(results.lse.at[piece.row, piece.head])

    @pl.when(jnp.logical_not(piece.whole))
    def _():
        half = 1 - piece.begins.astype(jnp.int32)
        rounded = out.astype(results.parts.dtype)
        tile.store(rounded, lse)
        tile.send(results.parts.at[half, place, 0])
        tile.send_lse(results.part_lse.at[half, place])
        tile.store(out - rounded.astype(jnp.float32), lse)
        tile.send(results.parts.at[half, place, 1])


def _clear_inactive(contexts, tile: Tile, results: Results):
    """Zeros for the inactive rows; the thread blocks take turns."""
    rows, kv_heads = results.lse.shape[:2]
    block, blocks = lax.axis_index("block"), lax.axis_size("block")

    def clear(turn, _):
        row = block + turn * blocks

        @pl.when(contexts[row] == 0)
        def _():
            tile.store_zeros()
            for head in range(kv_heads):
                tile.send(results.out.at[row, head])
                tile.send_lse(results.lse.at[row, head])

    lax.fori_loop(0, lax.div(rows - block + (blocks - 1), blocks), clear, None)
