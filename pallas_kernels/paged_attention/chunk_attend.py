"""What a compute warpgroup of the chunk kernel does: one head's 64 queries of each item, block of keys by block.

While the tensor cores add one block's P V to the sums, they also make the next block's scores, and the warpgroup turns
those into weights: FlashAttention-3's overlap within a warpgroup (Shah et al., arXiv 2407.08608, algorithm 2).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PER_COLUMN, PER_ROW, WGMMA, product
from pallas_kernels.paged_attention.chunk_tiling import PAGE, QUERIES, Items

LOWEST = -1e30
"""The highest score before any; finite, so that the difference of two of them is not NaN."""


def rows_of(values, columns: int):
    """[64] values, one per query, repeated along that many columns."""
    return lax.broadcast_in_dim(values, (QUERIES, columns), [0])


def row_iota():
    """[64] int32: which query."""
    return plgpu.broadcasted_iota(jnp.int32, (QUERIES,), 0, layout=PER_ROW)


def iota(columns: int, dimension: int):
    return plgpu.broadcasted_iota(jnp.int32, (QUERIES, columns), dimension, layout=WGMMA)


@dataclass(frozen=True)
class Attend:
    """One compute warpgroup.

    Attributes:
        out, lse: the kernel's results in global memory.
        scale: factor on the scores, in units of log 2.
        interpreted: whether the interpreter runs this.
        warpgroup: which of the item's heads this one takes.
        q_tile ... columns: shared memory and barriers, see ``chunk._scratch``. ``columns`` holds 0, 1, 2 ...: read
            for each mask, because the compiler would keep 32 registers for them through all loops and spill.
    """

    items: Items
    out: Any
    lse: Any
    scale: float
    interpreted: bool
    warpgroup: Any
    q_tile: Any
    keys: Any
    values: Any
    out_tile: Any
    q_loaded: Any
    q_read: Any
    keys_loaded: Any
    keys_read: Any
    values_loaded: Any
    values_read: Any
    tail_cleared: Any
    columns: Any

    def run(self):
        """Attends for every item of the thread block."""
        keys = self.items.tiling.keys
        self.columns[self.warpgroup] = plgpu.broadcasted_iota(jnp.int32, (keys,), 0, layout=PER_COLUMN)
        self.items.for_each(self._attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _attend(self, item, step):
        pl.when(item.blocks > 0)(lambda: self._attend_to_context(item, step))
        pl.when(item.blocks == 0)(lambda: self._write(item, *self._nothing()))
        return step + item.blocks

    def _nothing(self):
        """Sums of weighted values, highest score (in units of log 2) and sum of exponentials, before any key."""
        head_size = self.q_tile.shape[-1]
        sums = plgpu.layout_cast(jnp.zeros((QUERIES, head_size), jnp.float32), WGMMA)
        highest = plgpu.layout_cast(jnp.full((QUERIES,), LOWEST, jnp.float32), PER_ROW)
        total = plgpu.layout_cast(jnp.zeros((QUERIES,), jnp.float32), PER_ROW)
        return sums, highest, total

    def _attend_to_context(self, item, step):
        """Goes through the item's blocks from the last to the first; only the first few (commonly one) need a mask."""
        keys = self.items.tiling.keys
        seen_by_all = lax.div(item.position + 1, keys)
        masked = lax.max(item.blocks - seen_by_all, 1)
        carry = self._first_block(item, step)
        carry = lax.fori_loop(1, masked, lambda i, c: self._next_block(item, step, i, c, mask=True), carry)
        carry = lax.fori_loop(masked, item.blocks, lambda i, c: self._next_block(item, step, i, c, mask=False), carry)
        plgpu.barrier_arrive(self.q_read)
        sums, highest, total, weights = carry
        slot = self._slot(step + item.blocks - 1)
        sums = product(sums, weights, self.values.at[slot], interpreted=self.interpreted)
        plgpu.barrier_arrive(self.values_read.at[slot])
        self._write(item, sums, highest, total)

    def _first_block(self, item, step):
        """The last keys of the context: scores and weights, and the rows of V beyond the context cleared."""
        slot = self._slot(step)
        sums, highest, total = self._nothing()
        plgpu.barrier_wait(self.q_loaded)
        plgpu.barrier_wait(self.keys_loaded.at[slot])
        q, keys = self.q_tile.at[self.warpgroup], self.keys.at[slot].T
        scores = product(None, q, keys, interpreted=self.interpreted)
        plgpu.barrier_arrive(self.keys_read.at[slot])
        highest, total, _, weights = self._soften(self._masked(scores, item, 0), highest, total)
        weights = weights.astype(self.values.dtype)
        plgpu.barrier_wait(self.values_loaded.at[slot])
        pl.when(lax.rem(item.context, PAGE) > 0)(lambda: self._clear_tail(item, slot))
        return sums, highest, total, weights

    def _clear_tail(self, item, slot):
        """Makes the rows of V beyond the context zero: what stands there may be NaN, and 0 * NaN is NaN."""

        @pl.when(self.warpgroup == 0)
        def _():
            tiling = self.items.tiling
            there = item.context - (item.blocks - 1) * tiling.keys
            for page in range(tiling.pages):
                rows = self.values.at[slot, pl.ds(page * PAGE, PAGE)]
                kept = iota(rows.shape[1], 0) < there - page * PAGE
                rows[...] = jnp.where(kept, plgpu.load(rows, layout=WGMMA), jnp.zeros((), rows.dtype))
            plgpu.commit_smem()

        plgpu.barrier_arrive(self.tail_cleared)
        plgpu.barrier_wait(self.tail_cleared)

    def _next_block(self, item, step, i, carry, *, mask: bool):
        """Block i's scores and weights, while block i - 1 is added to the sums."""
        sums, highest, total, weights = carry
        before, slot = self._slot(step + i - 1), self._slot(step + i)

        def soften(scores):
            plgpu.barrier_arrive(self.keys_read.at[slot])
            return self._soften(self._masked(scores, item, i) if mask else scores, highest, total)

        plgpu.barrier_wait(self.keys_loaded.at[slot])
        q, keys = self.q_tile.at[self.warpgroup], self.keys.at[slot].T
        sums, (highest, total, decay, weights) = overlapped(
            sums, weights, self.values.at[before], q, keys, soften, self.interpreted
        )
        plgpu.barrier_arrive(self.values_read.at[before])
        plgpu.barrier_wait(self.values_loaded.at[slot])
        return sums * rows_of(decay, sums.shape[1]), highest, total, weights.astype(self.values.dtype)

    def _slot(self, step):
        return lax.rem(step, self.items.tiling.stages)

    def _masked(self, scores, item, i):
        """Scores of the item's block i (counted from the last) with those of keys behind the query taken out."""
        keys = scores.shape[1]
        last = row_iota() + (item.position - (item.blocks - 1 - i) * keys)
        columns = plgpu.load(self.columns.at[self.warpgroup], layout=PER_COLUMN)
        seen = lax.broadcast_in_dim(columns, scores.shape, [1]) <= rows_of(last, keys)
        return jnp.where(seen, scores, -jnp.inf)

    def _soften(self, scores, highest, total):
        """New highest score, sum of exponentials, factor for what was summed before, and the weights of the block."""
        new_highest = jnp.maximum(highest, scores.max(axis=1) * self.scale)
        decay = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores * self.scale - rows_of(new_highest, scores.shape[1]))
        return new_highest, total * decay + weights.sum(axis=1), decay, weights

    def _write(self, item, sums, highest, total):
        """Results of this head's queries; zero beyond the tile's length."""
        head = item.first_head + self.warpgroup
        there = head < (item.kv_head + 1) * self.items.group
        length = item.context - item.position
        tile = self.out_tile.at[self.warpgroup]
        head_size = sums.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile[...] = jnp.where(iota(head_size, 0) < length, sums * rows_of(1 / total, head_size), 0.0).astype(tile.dtype)
        plgpu.commit_smem()

        @pl.when(there)
        def _():
            plgpu.copy_smem_to_gmem(tile, self.out.at[item.slots, head])
            lse = highest * math.log(2) + jnp.log(total)
            self.lse[item.tile, :, head] = jnp.where(row_iota() < length, lse, 0.0)


def overlapped(sums, weights, values, q, keys, soften, interpreted: bool):
    """(sums + weights values, soften(q keys)), where soften runs while the tensor cores still add to the sums.

    Args:
        sums: [64, head_size] float32; weights: [64, keys], 16-bit; both in registers, layout WGMMA.
        values: [keys, head_size]; q: [64, head_size]; keys: [head_size, keys]: shared memory, 16-bit.
        soften: takes the scores [64, keys] float32. What it makes must not be an operand of the running product:
            16-bit weights are cast by the caller, after this, since they take the registers of the old ones.
    """
    if interpreted:
        scores = product(None, q, keys, interpreted=True)
        softened = soften(scores)
        return product(sums, weights, values, interpreted=True), softened

    def run(score_accumulator, sum_accumulator):
        sum_accumulator[...] = sums
        plgpu.wgmma(score_accumulator, q, keys)
        plgpu.wgmma(sum_accumulator, weights, values)
        scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(score_accumulator, wait_n=1))
        softened = soften(scores)
        return lax.optimization_barrier((sum_accumulator[...], softened))

    accumulators = plgpu.ACC((QUERIES, keys.shape[1]), jnp.float32), plgpu.ACC(sums.shape, jnp.float32)
    return pl.run_scoped(run, *accumulators)
