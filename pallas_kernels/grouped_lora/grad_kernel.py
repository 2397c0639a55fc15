"""The gradients of low-rank factors on a Hopper GPU: x and d_y read once, d_x written once, in one kernel.

A cluster of blocks has a tile of tokens; its warpgroups divide the columns into pieces of 64, which stream through
shared memory. First come the pieces of d_y, each a term of the cotangent of ``h = scale * x a`` and the whole of the
tile's share of some columns of d_b. Then the blocks exchange their terms of that cotangent. Then come the pieces of x,
prefetched meanwhile: each gives the tile's share of some rows of d_a, and makes room for its piece of d_x.

    d_h = scale * sum over pieces of d_y b'      d_b += h' d_y
    d_a += x' d_h                                d_x  = d_h a'

The shares of d_a and d_b of all tiles are added in memory by the copy engine, in no fixed order.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora.grad_tiling import COLUMNS, INTERPRETED, RANK_STEP, ROWS, GradTiling, grad_tiling
from pallas_kernels.grouped_lora.grad_worker import Worker
from pallas_kernels.mosaic import whole


def grouped_lora_grad(
    x, d_y, a, b, scale, h, d_x_base, *, widths, in_order=False, interpret=None, tiling: GradTiling | None = None
):
    """See ``api.grouped_lora_grad``."""
    modules, rank = len(widths), b.shape[0]
    _check(x, widths)
    padded = -(-rank // RANK_STEP) * RANK_STEP
    tiling = tiling or (grad_tiling(x.shape[0], modules, padded) if interpret is None else INTERPRETED)
    scale = jnp.asarray(scale, jnp.float32).reshape(1)
    if h is None:
        h = (jnp.dot(x, a, preferred_element_type=jnp.float32) * scale).astype(x.dtype)
    of_modules = lambda v: _padded(v.reshape(v.shape[0], modules, rank), padded, 2)
    operands = whole(x, d_y, of_modules(a).swapaxes(0, 1), _padded(b, padded, 0), of_modules(h), scale)
    kernel = _kernel(x.shape[0] // tiling.tokens, tiling, modules, padded, x.dtype, interpret)
    if in_order or interpret is not None:  # the interpreter cannot add in memory
        interpreted = interpret is not None
        d_a, d_b, d_x = _added_in_order(kernel, operands, widths, tiling, d_x_base, interpreted)
    else:
        d_a, d_b, d_x = _added_in_memory(kernel, operands, widths, tiling, d_x_base)
    return d_a[:, :, :rank].swapaxes(0, 1).reshape(x.shape[1], modules * rank), d_b[:rank], d_x


def _check(x, widths):
    if x.dtype.itemsize != 2:
        raise ValueError(f"grouped_lora_grad: the Mosaic GPU kernel takes 16-bit types, not {x.dtype}")
    for name, size in (("slots", x.shape[0]), ("inputs", x.shape[1]), *(("outputs", width) for width in widths)):
        if size % ROWS:
            raise ValueError(f"grouped_lora_grad: the Mosaic GPU kernel takes multiples of {ROWS} {name}, not {size}")


def _padded(value, size, axis):
    missing = size - value.shape[axis]
    return jnp.pad(value, [(0, missing if i == axis else 0) for i in range(value.ndim)]) if missing else value


def _added_in_memory(kernel, operands, widths, tiling, d_x_base):
    """The kernel's (d_a, d_b, d_x), each the sum of what the tiles add to it."""
    x, _, a, b, *_ = operands
    d_a, d_b = (jax.new_ref(jnp.zeros((1, *factor.shape), jnp.float32)) for factor in (a, b))
    body, terms = functools.partial(_body, widths, tiling, adding=True), _terms(a, x, tiling)
    if d_x_base is None:
        d_x, _ = kernel(body, out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), terms))(*operands, d_a, d_b)
    else:
        d_x = jax.new_ref(d_x_base)
        kernel(functools.partial(body, adds_to_base=True), out_type=(terms,))(*operands, d_a, d_b, d_x)
        d_x = jax.freeze(d_x)
    return jax.freeze(d_a)[0], jax.freeze(d_b)[0], d_x


def _added_in_order(kernel, operands, widths, tiling, d_x_base, interpreted):
    """The same from every tile's own sums, added in a fixed order, at the cost of writing and reading them."""
    x, _, a, b, *_ = operands
    tiles = x.shape[0] // tiling.tokens
    d_a, d_b = (jax.ShapeDtypeStruct((tiles, *factor.shape), jnp.float32) for factor in (a, b))
    outputs = (d_a, d_b, jax.ShapeDtypeStruct(x.shape, x.dtype), _terms(a, x, tiling))
    body = functools.partial(_body, widths, tiling, interpreted=interpreted)
    d_a, d_b, d_x, _ = kernel(body, out_type=outputs)(*operands)
    return d_a.sum(0), d_b.sum(0), d_x if d_x_base is None else d_x_base + d_x


def _terms(a, x, tiling):
    """Where the blocks of a cluster leave their terms of d_h for each other."""
    modules, _, rank = a.shape
    shape = (x.shape[0] // tiling.tokens, tiling.shares, modules, tiling.tokens, rank)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernel(tiles, tiling, modules, rank, dtype, interpret):
    """plgpu.kernel of this grid, still without body and outputs."""
    return functools.partial(
        plgpu.kernel,
        grid=(tiles,),
        grid_names=("tile",),
        cluster=(tiling.shares,),
        cluster_names=("share",),
        num_threads=tiling.workers,
        thread_name="worker",
        scratch_types=_scratch(tiling, modules, rank, dtype),
        interpret=interpret,
        kernel_name="grouped_lora_grad",
    )


SCRATCH = ("pieces", "a_pieces", "b_pieces", "h_turned", "d_h", "d_h_turned", "tiles", "d_b_tiles")
BARRIERS = ("loaded", "met", "exchanged")
NAMES = ("x", "d_y", "a", "b", "h", "scale", "d_a_sum", "d_b_sum", "d_x", "terms", *SCRATCH, *BARRIERS)


def _scratch(tiling, modules, rank, dtype):
    """Turned arrays have tokens along their rows, so that every product reads whole lines of 128 bytes."""
    own, tokens = (tiling.workers, tiling.slots), tiling.tokens
    return (
        plgpu.SMEM((*own, tokens, COLUMNS), dtype),
        plgpu.SMEM((*own, modules, COLUMNS, rank), dtype),
        plgpu.SMEM((*own, rank, COLUMNS), dtype),
        plgpu.SMEM((modules, rank, tokens), dtype),
        plgpu.SMEM((modules, tokens, rank), dtype),
        plgpu.SMEM((modules, rank, tokens), dtype),
        plgpu.SMEM((tiling.workers, tiling.sum_tiles, modules, COLUMNS, rank), jnp.float32),
        plgpu.SMEM((tiling.workers, tiling.staged, rank, COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=tiling.workers * tiling.slots),
        plgpu.Barrier(num_arrivals=tiling.workers),
        plgpu.ClusterBarrier(collective_axes=("share",), num_arrivals=tiling.workers),
    )


def _body(widths, tiling, *refs, adding=False, adds_to_base=False, interpreted=False):
    """One warpgroup. ``adding``: d_a and d_b are sums of all tiles; else every tile has its own."""
    refs = SimpleNamespace(**dict(zip(NAMES, refs, strict=True)))
    worker = Worker(refs, widths, tiling, adding=adding, adds_to_base=adds_to_base, interpreted=interpreted)
    for i in range(tiling.slots):
        worker.load(jnp.int32(i))
    worker.turn_h()
    terms = [worker.from_d_y(module) for module in range(len(widths))]
    worker.exchange(terms)
    worker.from_x()
    plgpu.wait_smem_to_gmem(0)
