"""How the blocks of the gradient kernel tell each other that something is written to memory.

On a GPU they count semaphores up, so a tile's blocks may run on any multiprocessors: a cluster of 8 must lie in one
group of them, and not every GPU has room for 16 such at once. The interpreter has no semaphores; there the blocks of a
tile are a cluster, and its barrier does the same.

None waits for ever, even where not all blocks run at the same time: they start in order, so those of one tile, and the
first ``CLEARING``, which clear the sums of all, start before any that waits for them and holds the room that they need.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CLEARING = 16
"""Blocks that write zeros where all will add: as many as the smallest partition of a Hopper GPU runs at once."""


@dataclass(frozen=True)
class Meeting:
    """Where this block stands among the others, and what they count.

    Attributes:
        block: of the whole kernel; tile, share: its tile, and its place among the blocks of that.
        warpgroups: of a tile, of those that clear.
        semaphores: how many warpgroups have told, by tile, then of those that clear; None in the interpreter.
        barrier: of the cluster; None on a GPU.
    """

    block: Any
    tile: Any
    share: Any
    warpgroups: tuple[int, int]
    semaphores: Any
    barrier: Any

    def of_tile(self, time: int):
        """Until all warpgroups of the tile are here for the first, second, ... time, and see what each wrote."""
        if self.semaphores is None:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)
        else:
            plgpu.semaphore_signal(self.semaphores.at[self.tile], memory_scope="gpu")
            _wait(self.semaphores.at[self.tile], time * self.warpgroups[0])

    def tell_cleared(self):
        """This warpgroup's zeros are written."""
        plgpu.semaphore_signal(self.semaphores.at[self.semaphores.shape[0] - 1], memory_scope="gpu")

    def await_cleared(self):
        """Until everything is cleared."""
        _wait(self.semaphores.at[self.semaphores.shape[0] - 1], self.warpgroups[1])


def _wait(semaphore, count):
    plgpu.semaphore_wait(semaphore, count, decrement=False, memory_scope="gpu")


def grid(tiles: int, shares: int, interpreted: bool) -> dict:
    """Arguments of plgpu.kernel."""
    if interpreted:
        return dict(grid=(tiles,), grid_names=("tile",), cluster=(shares,), cluster_names=("share",))
    return dict(grid=(tiles * shares,), grid_names=("block",))


def meeting(tiles: int, tiling, barrier) -> Meeting:
    """Of the block that runs; ``barrier`` is that of its cluster, None on a GPU."""
    shares = tiling.shares
    warpgroups = shares * tiling.workers, min(CLEARING, tiles * shares) * tiling.workers
    if barrier is not None:
        tile, share = lax.axis_index("tile"), lax.axis_index("share")
        return Meeting(tile * shares + share, tile, share, warpgroups, None, barrier)
    block = lax.axis_index("block")
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles + 1,)))
    tile, share = lax.div(block, jnp.int32(shares)), lax.rem(block, jnp.int32(shares))
    return Meeting(block, tile, share, warpgroups, semaphores, None)
