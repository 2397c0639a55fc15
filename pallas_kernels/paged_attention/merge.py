"""Joins the parts of a row and head that several workers of the decode kernel share.

On a GPU the last worker of a chain joins its parts once the others have told it that theirs are written. The
interpreter has no semaphores; there a second kernel does the same.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.decode_buffers import Tile, tile_types
from pallas_kernels.paged_attention.tiling import GROUP, LOWEST

AT_ONCE = 8
"""Parts loaded together; a chain has more where rows are few and long."""


class Results(NamedTuple):
    """Refs in global memory.

    Attributes:
        out: [at least rows, kv_heads, group, head_size]; lse: [rows, kv_heads, 8] float32.
        parts: [2, workers, 2, 8, head_size]; by place, of chains that begin in a worker, then of chains that go on in
            it; a part is the sum of its two halves. part_lse: [2, workers, 8] float32, to base 2.
    """

    out: Any
    lse: Any
    parts: Any
    part_lse: Any


def await_parts(chains, worker):
    """Tells the worker that ends the chain begun or continued here, and waits for the parts of the chain ended here.

    Workers wait for lower ones only, which belong to the same thread block or to one that started earlier, and they
    tell before they wait: none waits for ever, even where not all thread blocks run at the same time.
    """
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((chains.shape[0],)))
    place, begins, ends = (chains[worker, field] for field in range(2, 5))

    @pl.when(ends > place)
    def _():
        plgpu.semaphore_signal(arrived.at[ends], memory_scope="gpu")

    @pl.when(begins < place)
    def _():
        plgpu.semaphore_wait(arrived.at[place], place - begins, decrement=False, memory_scope="gpu")


def merge(out, lse, parts, part_lse, chains, *, interpret):
    """The results with those of all chains filled in; as a kernel of its own."""
    results = jax.new_ref(out), jax.new_ref(lse)
    kernel = plgpu.kernel(
        _body,
        out_type=(),
        scratch_types={"tile": tile_types(1, out.shape[-1], out.dtype)},
        grid=(len(chains),),
        grid_names=("worker",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="paged_attention_merge",
    )
    kernel(parts, part_lse, chains, *results)
    return tuple(jax.freeze(result) for result in results)


def _body(parts, part_lse, chains, out, lse, *, tile):
    tile = Tile(**{name: ref.at[0] for name, ref in tile.items()})
    finish_chain(chains, lax.axis_index("worker"), Results(out, lse, parts, part_lse), tile)
    plgpu.wait_smem_to_gmem(0)


def finish_chain(chains, worker, results: Results, tile: Tile):
    """Writes the result of the chain that ends in this worker, if one does."""
    row, head, place, begins, _ = (chains[worker, field] for field in range(5))

    @pl.when(begins < place)
    def _():
        out, lse = _join(results.parts, results.part_lse, begins, place)
        tile.store_group(out, lse * math.log(2))
        tile.send(results.out.at[row, head])
        tile.send_lse(results.lse.at[row, head])


def _layout(head_size: int):
    """How a warpgroup holds the heads of a group: two rows a warp, head_size / 32 neighbouring values a thread."""
    tiles = ((GROUP, head_size), (2, head_size), (head_size // 32,))  # the tiled shape ends in 4, 1, 2, 32, vector
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1)


def _join(parts, part_lse, first, last):
    """Mean of the parts at the places first .. last, weighted by their exponentials, and the logarithm of the sum."""
    layout = _layout(parts.shape[-1])
    per_row = layout.reduce(1)

    def load(place):
        """The part at a place, a float32 [8, head_size], and its logarithm, [8]."""
        place, half = lax.min(place, last), (place > first).astype(jnp.int32)
        high, low = (plgpu.load(parts.at[half, place, i], layout=layout, optimized=False) for i in range(2))
        logarithm = plgpu.load(part_lse.at[half, place], layout=per_row, optimized=False)
        return high.astype(jnp.float32) + low.astype(jnp.float32), logarithm

    def add(turn, carry):
        weighted, highest, total = carry
        places = [first + turn * AT_ONCE + i for i in range(AT_ONCE)]
        loaded = [load(place) for place in places]
        new_highest = functools.reduce(jnp.maximum, (logarithm for _, logarithm in loaded), highest)
        decay = jnp.exp2(highest - new_highest)
        weighted, total = weighted * lax.broadcast_in_dim(decay, weighted.shape, [0]), total * decay
        for place, (part, logarithm) in zip(places, loaded, strict=True):
            weight = jnp.exp2(logarithm - new_highest) * (place <= last).astype(jnp.float32)
            weighted, total = weighted + part * lax.broadcast_in_dim(weight, part.shape, [0]), total + weight
        return weighted, new_highest, total

    zeros = plgpu.layout_cast(jnp.zeros(parts.shape[-2:], jnp.float32), layout)
    none = tuple(plgpu.layout_cast(jnp.full((GROUP,), value, jnp.float32), per_row) for value in (LOWEST, 0.0))
    turns = lax.div(last - first + AT_ONCE, AT_ONCE)
    weighted, highest, total = lax.fori_loop(0, turns, add, (zeros, *none))
    return weighted / lax.broadcast_in_dim(total, weighted.shape, [0]), highest + jnp.log2(total)
