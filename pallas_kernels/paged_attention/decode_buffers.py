"""Shared memory of the decode kernel: a ring of blocks of K and V, and a tile through which queries and results go."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PER_ROW, WGMMA
from pallas_kernels.paged_attention.tiling import GROUP, KEYS, ROWS, Tiling


def scratch_types(tiling: Tiling, head_size: int, dtype) -> dict:
    """Fields of ``Ring`` and ``Tile`` for all streams of a thread block."""
    slots, streams = tiling.streams * tiling.stages, tiling.streams
    blocks = plgpu.SMEM((slots, KEYS, head_size), dtype)
    return {
        "ring": {
            "keys": blocks,
            "values": blocks,
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            "read": plgpu.Barrier(num_barriers=slots),
        },
        "tile": tile_types(streams, head_size, dtype),
    }


def tile_types(streams: int, head_size: int, dtype) -> dict:
    """Fields of ``Tile`` for so many streams."""
    return {
        "rows": plgpu.SMEM((streams, ROWS, head_size), dtype),
        "lse": plgpu.SMEM((streams, ROWS), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=streams),
    }


@dataclass(frozen=True)
class Ring:
    """Blocks of K and V of one stream, loaded by one warpgroup and read by another.

    Attributes:
        first, stages: the stream's slots are first .. first + stages - 1; step n uses the (n mod stages)-th of them.
        keys, values: [slots, 64, head_size] shared memory.
        loaded, read: barrier per slot; a block of K and of V has arrived, both have been used.
    """

    first: Any
    stages: int
    keys: Any
    values: Any
    loaded: Any
    read: Any

    def free_slot(self, step):
        """Slot of this step, once its block of an earlier step has been used."""
        slot = self.first + lax.rem(step, self.stages)
        pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(self.read.at[slot]))
        return slot

    def loaded_slot(self, step):
        """Slot of this step, once its block is there."""
        slot = self.first + lax.rem(step, self.stages)
        plgpu.barrier_wait(self.loaded.at[slot])
        return slot

    def release(self, slot):
        plgpu.barrier_arrive(self.read.at[slot])

    def clear_values(self, slot, seen):
        """Zeros for the values of all but the first ``seen`` keys: NaN there would survive a weight of zero."""
        values = plgpu.load(self.values.at[slot], layout=WGMMA, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
        self.values[slot] = jnp.where(key < seen, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    def drain(self, steps):
        """Waits for the last blocks to be used, as every completion of a barrier must be waited for."""

        def wait(step, _):
            plgpu.barrier_wait(self.read.at[self.first + lax.rem(step, self.stages)])

        lax.fori_loop(lax.max(steps - self.stages, 0), steps, wait, None)


@dataclass(frozen=True)
class Tile:
    """The heads of one group, on their way in or out; rows beyond the group hold anything.

    Attributes:
        rows: [64, head_size] shared memory.
        lse: [64] float32 shared memory.
        loaded: barrier for queries.
    """

    rows: Any
    lse: Any
    loaded: Any

    def load(self, queries):
        """Queries [group, head_size] in global memory as registers [64, head_size]."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(queries, self.rows.at[pl.ds(0, queries.shape[0])], self.loaded)
        plgpu.barrier_wait(self.loaded)
        return plgpu.load(self.rows, layout=WGMMA, optimized=False)

    def store(self, out, lse):
        """Registers [64, head_size] and [64] into the tile, ready to be sent."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.rows[...] = out.astype(self.rows.dtype)
        self.lse[...] = lse
        plgpu.commit_smem()

    def store_group(self, out, lse):
        """Registers [8, head_size] and [8] into the first rows of the tile, ready to be sent."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.rows[pl.ds(0, GROUP)] = out.astype(self.rows.dtype)
        self.lse[pl.ds(0, GROUP)] = lse
        plgpu.commit_smem()

    def store_zeros(self):
        out = plgpu.layout_cast(jnp.zeros(self.rows.shape, self.rows.dtype), WGMMA)
        self.store(out, plgpu.layout_cast(jnp.zeros(self.lse.shape, jnp.float32), PER_ROW))

    def send(self, target):
        """The first rows to [group, head_size] in global memory."""
        plgpu.copy_smem_to_gmem(self.rows.at[pl.ds(0, target.shape[0])], target)

    def send_lse(self, target):
        """The first values to [8] in global memory."""
        plgpu.copy_smem_to_gmem(self.lse.at[pl.ds(0, GROUP)], target)
