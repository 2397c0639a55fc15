"""``window_attention_grad`` as callers use it: arguments checked, implementation named."""

import functools
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.window_attention_grad import kernel, reference

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.window_attention_grad,
        "mosaic_gpu": kernel.window_attention_grad,
        "mosaic_gpu_interpreted": functools.partial(kernel.window_attention_grad, interpret=INTERPRETER),
    }
)


def window_attention_grad(
    q,
    out,
    lse,
    d_out,
    pool,
    layer,
    tables,
    block_starts,
    first_block,
    d_k,
    d_v,
    *,
    kv_heads: int,
    scale: float,
    implementation: str = "reference",
):
    """Gradients that a window of queries sends to itself and to the K/V rows it attends to.

    A microbatch is an axis of blocks of one page of slots each, on which sequences lie one after another, each from a
    block of its own on. A query in block b attends to the keys of blocks ``block_starts[b]`` .. b up to its own slot.
    Called for the windows of a microbatch from last to first, the rows of ``d_k`` and ``d_v`` of a window are complete
    once it and every later window have been added.

        two sequences of 3 and 2 blocks, window of 2 blocks:
        block          0  1 | 2  3 | 4  5
        block_starts   0  0 | 0  3 | 3  5     (block 5 is padding)
        the window at first_block = 2 adds to d_k, d_v of blocks 0 .. 3

    Args:
        q, out, d_out: [window, query_heads, head_size]; queries, attention output, cotangent of the output. A query
            whose d_out is 0 (padding) contributes exactly nothing, whatever its out and lse hold; q must be finite.
        lse: [window, query_heads] float32, as ``paged_attention`` returns it.
        pool: [layers, pages, page, 2 * kv_heads * head_size]; a row reshapes to (2, kv_heads, head_size): K, then V.
            Rows to which no query with a cotangent attends may hold anything (NaN too).
        layer: int32 scalar, may be traced.
        tables: [blocks] int32, page of every block of the microbatch.
        block_starts: [blocks] int32, first block of the sequence that a block belongs to.
        first_block: int32 scalar, may be traced: first block of the window.
        d_k, d_v: [blocks * page, kv_heads, head_size] float32, sums so far.
        scale: factor on the scores, as in the forward pass.
        implementation: "mosaic_gpu" takes bfloat16 or float16, head sizes 64 and 128, and pages of 64 rows.

    Returns:
        d_q: like q; d_k, d_v: the sums with this window's part added. All products are summed in float32; "mosaic_gpu"
        rounds weights and gradients of scores to the dtype of q before the second products, and adds d_q in no fixed
        order: its last float32 bits, before it is rounded to the dtype of q, can differ from run to run.

    Raises:
        ValueError: shapes or dtypes that do not fit together or that the implementation does not take, or an unknown
            implementation.
    """
    _check_queries(q, out, lse, d_out, kv_heads)
    _check_blocks(q, pool, tables, block_starts, d_k, d_v, kv_heads)
    run = choose("window_attention_grad", IMPLEMENTATIONS, implementation)
    arguments = (q, out, lse, d_out, pool, layer, tables, block_starts, first_block, d_k, d_v)
    return run(*arguments, kv_heads=kv_heads, scale=scale)


def _check_queries(q, out, lse, d_out, kv_heads):
    for name, array, shape in (("out", out, q.shape), ("d_out", d_out, q.shape), ("lse", lse, q.shape[:2])):
        if array.shape != shape:
            raise ValueError(f"window_attention_grad: {name} has shape {array.shape}; q of {q.shape} needs {shape}")
    if q.shape[1] % kv_heads:
        raise ValueError(f"window_attention_grad: {q.shape[1]} query heads are not a multiple of {kv_heads} K/V heads")


def _check_blocks(q, pool, tables, block_starts, d_k, d_v, kv_heads):
    window, _, head_size = q.shape
    page, width = pool.shape[2:]
    blocks = tables.shape[0]
    if width != 2 * kv_heads * head_size:
        raise ValueError(
            f"window_attention_grad: rows of the pool have {width} values; K and V of {kv_heads} heads of {head_size} "
            f"need {2 * kv_heads * head_size}"
        )
    if window % page or window > blocks * page:
        raise ValueError(
            f"window_attention_grad: a window of {window} slots; it must be a multiple of the page of {page} and at "
            f"most the {blocks} blocks of the microbatch"
        )
    if block_starts.shape != tables.shape:
        raise ValueError(f"window_attention_grad: {block_starts.shape[0]} block starts for {blocks} blocks")
    for name, sums in (("d_k", d_k), ("d_v", d_v)):
        if sums.shape != (blocks * page, kv_heads, head_size) or sums.dtype != "float32":
            raise ValueError(
                f"window_attention_grad: {name} is {sums.dtype} {sums.shape}; {blocks} blocks need float32 "
                f"{(blocks * page, kv_heads, head_size)}"
            )
