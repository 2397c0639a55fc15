"""Mosaic GPU (Hopper) kernel of the window's attention gradient: the five products of FlashAttention-2 in one sweep.

A CTA takes an item of work (a pair of key blocks of one sequence) and a K/V head, and goes over the window's tiles of
64 queries that see them, for every query head of the group. Two warpgroups compute, see ``sums``; this file launches
them and the third, which loads the tiles of Q and dO with their log-sum-exp and delta.

dK and dV stay in registers over the whole sweep. dQ is added in global memory by the TMA engine, in no fixed order: its
last float32 bits can differ from run to run; those of dK and dV cannot.

The interpreter has no such addition; there every warpgroup of every item has its own copy of dQ, so that any other
unordered access is still reported as a race.
"""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.window_attention_grad import sums, work
from pallas_kernels.window_attention_grad.shared import COMPUTE, STAGES, Heads, Shared, allocations
from pallas_kernels.window_attention_grad.work import TILE

REGISTERS = {"load": 24, "compute": 240}
"""Of a thread, by what its warpgroup does; 65536 in all."""


def copies_of_d_q(items, interpret) -> int:
    return 1 if interpret is None else COMPUTE * items.shape[0]


def add_gradients(q, d_out, lse, delta, pool, layer, items, d_q, d_k, d_v, *, kv_heads, scale, interpret=None):
    """Adds to d_q, d_k and d_v.

    Args:
        q, d_out: [window, query_heads, D] 16-bit. lse, delta: [query_heads, window] float32; lse to base 2, infinite
            for a query without cotangent, whose delta is 0.
        pool: [layers, pages, 64, 2 * kv_heads * D]; layer: [1] int32; items: see ``work``.
        d_q: Ref [copies, window, query_heads, D] float32, zeros; the sum of the copies lacks the factor ``scale``.
        d_k, d_v: Refs [blocks * 64, kv_heads, D] float32.
    """
    heads = Heads(q.shape[1] // kv_heads, kv_heads, q.shape[2], scale, interpret is not None)

    def run(*arrays):
        sweep = lambda **buffers: _sweep(heads, Shared(**buffers), *arrays)
        pl.run_scoped(sweep, **allocations(heads, q.dtype), collective_axes="wg")

    plgpu.kernel(
        run,
        out_type=(),
        grid=(items.shape[0], kv_heads),
        grid_names=("item", "kv_head"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="window_attention_grad",
    )(q, d_out, lse, delta, pool, layer, items, d_q, d_k, d_v)


def _sweep(heads, shared, q, d_out, lse, delta, pool, layer, items, d_q, d_k, d_v):
    wg, number, kv_head = (lax.axis_index(name) for name in ("wg", "item", "kv_head"))
    item = [items[number, column] for column in range(work.COLUMNS)]
    steps = item[work.TILES] * heads.group

    def place(step):
        """(rows of the window, query head) of a step: every head of a tile, then the next tile."""
        tile = item[work.FIRST_TILE] + lax.div(step, heads.group)
        return pl.ds(tile * TILE, TILE), kv_head * heads.group + lax.rem(step, heads.group)

    @pl.when((steps > 0) & (wg == COMPUTE))
    def _load():
        plgpu.set_max_registers(REGISTERS["load"], action="decrease")
        _load_keys(heads, shared, pool.at[layer[0]], item, kv_head)
        _load_tiles(shared, (q, d_out, lse, delta), place, steps)

    @pl.when((steps > 0) & (wg < COMPUTE))
    def _compute():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        copy = number * COMPUTE + wg if heads.interpreted else 0
        totals = (total.at[:, kv_head] for total in (d_k, d_v))
        sums.add(heads, shared, wg, item, place, steps, d_q.at[copy], *totals)


def _load_keys(heads, shared, pages, item, kv_head):
    for part, column in enumerate((work.FIRST_PAGE, work.SECOND_PAGE)):
        for kind, destination in enumerate((shared.k, shared.v)):
            columns = pl.ds((kind * heads.kv_heads + kv_head) * heads.head_size, heads.head_size)
            plgpu.copy_gmem_to_smem(pages.at[item[column], :, columns], destination.at[part], shared.keys_loaded)


def _load_tiles(shared, arrays, place, steps):
    q, d_out, lse, delta = arrays

    def load(step, _):
        stage = lax.rem(step, STAGES)
        rows, head = place(step)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(shared.used.at[stage]))
        for source, destination, barrier in (
            (q.at[rows, head], shared.q, shared.q_loaded),
            (lse.at[head, rows], shared.lse, shared.q_loaded),
            (d_out.at[rows, head], shared.d_out, shared.d_out_loaded),
            (delta.at[head, rows], shared.delta, shared.d_out_loaded),
        ):
            plgpu.copy_gmem_to_smem(source, destination.at[stage], barrier.at[stage])

    lax.fori_loop(0, steps, load, None)
    drain = lambda step, _: plgpu.barrier_wait(shared.used.at[lax.rem(step, STAGES)])
    lax.fori_loop(lax.max(steps - STAGES, 0), steps, drain, None)
