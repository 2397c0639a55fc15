"""The gradients of low-rank factors on a Hopper GPU: x and d_y read once, d_x written once, in one kernel.

Some blocks share a tile of tokens; their warpgroups divide the columns into pieces of 64, which stream through
shared memory. First come the pieces of d_y, each a term of the cotangent of ``h = scale * x a`` and the whole of the
tile's share of some columns of d_b. Then the blocks exchange their terms of that cotangent. Then come the pieces of x,
prefetched meanwhile: each gives the tile's share of some rows of d_a, and makes room for its piece of d_x.

    d_h = scale * sum over pieces of d_y b'      d_b += h' d_y
    d_a += x' d_h                                d_x  = d_h a'

The shares of d_a and d_b of all tiles are added in memory by the copy engine, in no fixed order, to zeros that the
kernel's first blocks write. The low ranks of modules lie side by side, so that x is multiplied once for all of them.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_lora.grad_exchange import exchange
from pallas_kernels.grouped_lora.grad_meeting import grid, meeting
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
    of_modules = lambda v: _padded(v.reshape(v.shape[0], modules, rank), padded, 2).reshape(v.shape[0], -1)
    operands = whole(x, d_y, of_modules(a), _padded(b, padded, 0), of_modules(h), scale)
    in_order = in_order or interpret is not None  # the interpreter cannot add in memory
    d_a, d_b, d_x = _run(operands, d_x_base, widths, tiling, in_order, interpret)
    return d_a.reshape(x.shape[1], modules, padded)[:, :, :rank].reshape(x.shape[1], -1), d_b[:rank], d_x


def _check(x, widths):
    if x.dtype.itemsize != 2:
        raise ValueError(f"grouped_lora_grad: the Mosaic GPU kernel takes 16-bit types, not {x.dtype}")
    for name, size in (("slots", x.shape[0]), ("inputs", x.shape[1]), *(("outputs", width) for width in widths)):
        if size % ROWS:
            raise ValueError(f"grouped_lora_grad: the Mosaic GPU kernel takes multiples of {ROWS} {name}, not {size}")


def _padded(value, size, axis):
    missing = size - value.shape[axis]
    return jnp.pad(value, [(0, missing if i == axis else 0) for i in range(value.ndim)]) if missing else value


def _run(operands, d_x_base, widths, tiling, in_order, interpret):
    """(d_a, d_b, d_x). In order: every tile writes its own sums, which costs writing and reading them."""
    x, _, a, b, *_ = operands
    tiles, adds_to_base = x.shape[0] // tiling.tokens, d_x_base is not None and not in_order
    sums = [jax.ShapeDtypeStruct((tiles if in_order else 1, *factor.shape), jnp.float32) for factor in (a, b)]
    left = (  # by the blocks of a tile for each other: their terms of d_h, and its rows
        jax.ShapeDtypeStruct((tiles, tiling.shares, tiling.tokens, a.shape[1]), jnp.float32),
        jax.ShapeDtypeStruct((tiles, tiling.tokens, a.shape[1]), x.dtype),
    )
    kernel = functools.partial(
        plgpu.kernel,
        functools.partial(_body, widths, tiling, not in_order, adds_to_base, interpret is not None),
        num_threads=tiling.workers,
        thread_name="worker",
        scratch_types=_scratch(tiling, len(widths), b.shape[0], x.dtype, interpret is not None),
        interpret=interpret,
        kernel_name="grouped_lora_grad",
        **grid(tiles, tiling.shares, interpret is not None),
    )
    if adds_to_base:
        d_x = jax.new_ref(d_x_base)
        d_a, d_b, *_ = kernel(out_type=(*sums, *left))(*operands, d_x)
        return d_a[0], d_b[0], jax.freeze(d_x)
    d_x, d_a, d_b, *_ = kernel(out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), *sums, *left))(*operands)
    return d_a.sum(0), d_b.sum(0), d_x if d_x_base is None else d_x_base + d_x


SCRATCH = ("pieces", "factors", "low_turned", "d_h", "tiles", "d_b_tiles", "loaded", "met", "exchanged")
NAMES = ("x", "d_y", "a", "b", "h", "scale", "d_x", "d_a_sum", "d_b_sum", "terms", "d_h_rows", *SCRATCH)


def _scratch(tiling, modules, rank, dtype, interpreted):
    """Turned arrays have tokens along their rows, so that every product reads whole lines of 128 bytes. A slot has a
    piece of a or one of b, in the same place; the race detector would take the places of all slots for one."""
    own, tokens, ranks = (tiling.workers, tiling.slots), tiling.tokens, modules * rank
    a_or_b = tuple(plgpu.SMEM((*own, *shape), dtype) for shape in ((COLUMNS, ranks), (ranks, COLUMNS)))
    by_module = (plgpu.TilingTransform((8, RANK_STEP)), plgpu.SwizzleTransform(4 * RANK_STEP))
    cluster = plgpu.ClusterBarrier(collective_axes=("share",), num_arrivals=tiling.workers)
    return (
        plgpu.SMEM((*own, tokens, COLUMNS), dtype),
        a_or_b if interpreted else plgpu.RefUnion(*a_or_b),
        plgpu.SMEM((ranks, tokens), dtype),
        plgpu.SMEM((tokens, ranks), dtype),
        # Modules are written one by one. Not told how to lay them out, Mosaic searches for minutes.
        plgpu.SMEM(
            (tiling.workers, tiling.sum_tiles, COLUMNS, ranks), jnp.float32, transforms=by_module if modules > 1 else ()
        ),
        plgpu.SMEM((tiling.workers, tiling.staged, rank, COLUMNS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=tiling.workers * tiling.slots),
        plgpu.Barrier(num_arrivals=tiling.workers),
        *([cluster] if interpreted else []),
    )


def _body(widths, tiling, adding, adds_to_base, interpreted, *refs):
    """One warpgroup. ``adding``: d_a and d_b are sums of all tiles; else every tile has its own."""
    refs = SimpleNamespace(**dict(zip(NAMES, refs, strict=False)))
    refs.a_pieces, refs.b_pieces = refs.factors
    place = meeting(refs.x.shape[0] // tiling.tokens, tiling, refs.exchanged if interpreted else None)
    worker = Worker(refs, place, widths, tiling, adding=adding, adds_to_base=adds_to_base, interpreted=interpreted)
    for i in range(tiling.slots):
        worker.load(jnp.int32(i))
    worker.clear()
    worker.turn_h()
    worker.tell_cleared()
    terms = [worker.from_d_y(module) for module in range(len(widths))]
    exchange(worker, terms)
    worker.from_x()
    plgpu.wait_smem_to_gmem(0)
