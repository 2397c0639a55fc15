"""What the two computing warpgroups of a CTA do: dK, dV of a key block each, and half of dQ each.

A step is a tile of 64 queries and a query head:

    S' = K Q'    P' = exp2(S' - lse)    dP' = V dO'    dS' = P' (dP' - delta)    dV += P' dO    dK += dS' Q

Keys are rows, so that P' and dS' go from registers into the next product. dS' also goes to shared memory, from which
dQ = dS K is made one step later: a warpgroup need not wait there for the other, and one computes exponentials while the
other multiplies. Formulas: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.window_attention_grad import work
from pallas_kernels.window_attention_grad.shared import COLUMNS, PARTS, STAGES
from pallas_kernels.window_attention_grad.work import TILE


def add(heads, shared, wg, item, place, steps, d_q, d_k, d_v):
    """Adds what one warpgroup makes.

    Args:
        place: of a step, (rows of the window, query head).
        d_q: [window, query_heads, D], d_k, d_v: [blocks * 64, D]; float32 in global memory.
    """
    slots = (item[work.BLOCK] + wg) * TILE  # of the own keys, from here on
    plgpu.barrier_wait(shared.keys_loaded)
    _clear_unseen(heads, shared, wg, item[work.LIMIT] - slots)
    _store_d_scores(shared, wg, PARTS - 1, jnp.zeros((TILE, TILE), shared.q.dtype))  # of the step before the first
    add_d_q = functools.partial(_add_d_q, heads, shared, wg, place, d_q)
    d_k_part, d_v_part = _sweep(heads, shared, wg, item, steps, add_d_q)

    @pl.when(slots < item[work.LIMIT])
    def _():
        _add_rows(heads, shared, wg, d_k_part * heads.scale, d_k.at[pl.ds(slots, TILE)])
        _add_rows(heads, shared, wg, d_v_part, d_v.at[pl.ds(slots, TILE)])

    plgpu.wait_smem_to_gmem(0)


def _clear_unseen(heads, shared, wg, seen):
    """Zeros for own rows from ``seen`` on: no query sees them, they may hold NaN, and 0 * NaN is NaN."""

    @pl.when(seen < TILE)
    def _():
        row = plgpu.broadcasted_iota(jnp.int32, (TILE, heads.head_size), 0, layout=mosaic.WGMMA)
        for rows in (shared.k, shared.v):
            values = plgpu.load(rows.at[wg], layout=mosaic.WGMMA)
            rows[wg] = jnp.where(row < seen, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _sweep(heads, shared, wg, item, steps, add_d_q):
    """dK without its factor, dV, of the own keys [64, D] float32."""
    step = functools.partial(_step, heads, shared, wg, add_d_q)

    def run(d_k, d_v):
        behind = item[work.BLOCK] + wg - item[work.FIRST_QUERY]  # blocks from the first tile to the own keys
        masked = lax.clamp(0, behind + 1, item[work.TILES]) * heads.group
        offset = lambda i: (behind - lax.div(i, heads.group)) * TILE
        lax.fori_loop(0, masked, lambda i, _: step(i, d_k, d_v, offset(i)), None)
        lax.fori_loop(masked, steps, lambda i, _: step(i, d_k, d_v), None)
        plgpu.barrier_wait(shared.d_scores_stored.at[lax.rem(steps - 1, PARTS)])

        def last(d_q):
            _multiply_d_q(heads, shared, wg, lax.rem(steps - 1, PARTS), d_q)
            return plgpu.wgmma_accumulator_load(d_q)

        add_d_q(steps - 1, pl.run_scoped(last, plgpu.ACC((TILE, COLUMNS), jnp.float32)))
        return d_k[...], d_v[...]

    accumulator = plgpu.ACC((TILE, heads.head_size), jnp.float32)
    return pl.run_scoped(run, accumulator, accumulator)


def _step(heads, shared, wg, add_d_q, step, d_k, d_v, offset=None):
    """Adds a step to d_k and d_v and the step before to dQ; ``offset`` as for ``_scores``."""
    wg = lax.optimization_barrier(wg)  # else addresses that depend on it are kept in registers over all steps: spills
    stage, part, part_before = lax.rem(step, STAGES), lax.rem(step, PARTS), lax.rem(step + PARTS - 1, PARTS)
    weights, d_scores = _scores(heads, shared, wg, stage, offset)
    plgpu.barrier_wait(shared.d_scores_stored.at[part_before])
    _store_d_scores(shared, wg, part, d_scores)

    def multiply(d_q):
        _multiply_d_q(heads, shared, wg, part_before, d_q)
        _multiply_registers(heads, shared, wg, d_v, weights, shared.d_out.at[stage])
        _multiply_registers(heads, shared, wg, d_k, d_scores, shared.q.at[stage])
        add_d_q(lax.max(step - 1, 0), plgpu.wgmma_accumulator_load(d_q, wait_n=2))
        plgpu.wgmma_wait(0)

    pl.run_scoped(multiply, plgpu.ACC((TILE, COLUMNS), jnp.float32))
    plgpu.barrier_arrive(shared.used.at[stage])


def _scores(heads, shared, wg, stage, offset):
    """P', dS' [64 keys, 64 queries], 16-bit registers.

    Args:
        offset: slots from the first query to the first key, where some key lies behind a query; else None.
    """
    tile, dtype = (TILE, TILE), shared.q.dtype
    per_column = lambda ref: lax.broadcast_in_dim(plgpu.load(ref.at[stage], layout=mosaic.PER_COLUMN), tile, [1])
    plgpu.barrier_wait(shared.q_loaded.at[stage])

    def multiply(scores, d_weights):
        _multiply(heads, scores, shared.k.at[wg], shared.q.at[stage].T)
        plgpu.barrier_wait(shared.d_out_loaded.at[stage])
        _multiply(heads, d_weights, shared.v.at[wg], shared.d_out.at[stage].T)
        scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
        weights = jnp.exp2(scores * (heads.scale * math.log2(math.e)) - per_column(shared.lse))
        weights = weights if offset is None else jnp.where(_seen(offset), weights, 0.0)
        return weights, plgpu.wgmma_accumulator_load(d_weights)

    accumulator = plgpu.ACC(tile, jnp.float32)
    weights, d_weights = pl.run_scoped(multiply, accumulator, accumulator)
    return weights.astype(dtype), (weights * (d_weights - per_column(shared.delta))).astype(dtype)


def _seen(offset):
    """[64 keys, 64 queries] bool: the key does not lie behind the query."""
    key = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=mosaic.PER_ROW) + offset
    query = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=mosaic.PER_COLUMN)
    return lax.broadcast_in_dim(key, (TILE, TILE), [0]) <= lax.broadcast_in_dim(query, (TILE, TILE), [1])


def _store_d_scores(shared, wg, part, d_scores):
    shared.d_scores[part, wg] = plgpu.layout_cast(d_scores, mosaic.WGMMA)
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.d_scores_stored.at[part])


def _multiply_d_q(heads, shared, wg, part, d_q):
    """Starts the own columns of dQ = dS K."""
    if heads.head_size == COLUMNS:
        _multiply(heads, d_q, shared.d_scores.at[part, wg].T, shared.k.at[wg])
        return
    columns = pl.ds(pl.multiple_of(wg * COLUMNS, COLUMNS), COLUMNS)
    for block in range(2):
        _multiply(heads, d_q, shared.d_scores.at[part, block].T, shared.k.at[block, :, columns])


def _multiply_registers(heads, shared, wg, accumulator, a, b):
    """``_multiply`` with ``a`` in registers, which the interpreter takes from shared memory only."""
    if heads.interpreted:
        shared.operand[wg] = a
        plgpu.commit_smem()
        a = shared.operand.at[wg]
    _multiply(heads, accumulator, a, b)


def _multiply(heads, accumulator, a, b):
    """Starts accumulator += a b. The interpreter looks for races at loads, not at products: it loads, too."""
    plgpu.wgmma(accumulator, a, b)
    if heads.interpreted:
        _ = a[...], b[...]
        plgpu.commit_smem()


def _add_d_q(heads, shared, wg, place, d_q, step, value):
    rows, head = place(step)
    columns = slice(None) if heads.head_size == COLUMNS else pl.ds(wg * COLUMNS, COLUMNS)
    _add_to_memory(heads, shared.sums.at[wg], value, d_q.at[rows, head, columns])


def _add_rows(heads, shared, wg, value, total):
    for first in range(0, heads.head_size, COLUMNS):
        columns = slice(first, first + COLUMNS)
        target, part = total.at[:, columns], value[:, columns]
        _add_to_memory(heads, shared.sums.at[wg], part + target[...] if heads.interpreted else part, target)


def _add_to_memory(heads, stage, value, target):
    """target += value by way of ``stage``; the interpreter, which cannot add there, overwrites."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=not heads.interpreted)
    stage[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, target, reduction_op=None if heads.interpreted else "add")
