"""``window_attention_grad`` on a Hopper GPU: what XLA does before and after the Mosaic kernel."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import whole
from pallas_kernels.window_attention_grad import cta, work

DTYPES = ("bfloat16", "float16")
HEAD_SIZES = (64, 128)


def window_attention_grad(
    q, out, lse, d_out, pool, layer, tables, block_starts, first_block, d_k, d_v, *, kv_heads, scale, interpret=None
):
    """See ``api.window_attention_grad``."""
    _check(q, out, d_out, pool)
    lse, delta, has_cotangent = _per_query(out, lse, d_out)
    items = work.items(has_cotangent, tables, block_starts, first_block)
    copies = cta.copies_of_d_q(items, interpret)
    d_q, d_k, d_v = (jax.new_ref(sums) for sums in (jnp.zeros((copies, *q.shape), jnp.float32), d_k, d_v))
    read = whole(q, d_out, lse, delta, jnp.asarray(layer, jnp.int32)[None], items)
    cta.add_gradients(
        *(*read[:4], pool, *read[4:], d_q, d_k, d_v),
        kv_heads=kv_heads,
        scale=scale,
        interpret=interpret,
    )
    d_q = jnp.sum(jax.freeze(d_q), axis=0) * scale
    return d_q.astype(q.dtype), jax.freeze(d_k), jax.freeze(d_v)


def _per_query(out, lse, d_out):
    """(lse to base 2, delta) [query_heads, window] float32, and which queries have a cotangent [window, query_heads].

    For those without, whatever their out and lse hold, weights become exp2(finite - inf) = 0 and delta is 0.
    """
    has_cotangent = (d_out != 0).any(axis=-1)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    lse = jnp.where(has_cotangent, lse * math.log2(math.e), jnp.inf)
    return lse.T, jnp.where(has_cotangent, delta, 0.0).T, has_cotangent


def _check(q, out, d_out, pool):
    for name, array in (("q", q), ("out", out), ("d_out", d_out), ("pool", pool)):
        if array.dtype != q.dtype or array.dtype not in DTYPES:
            raise ValueError(
                f"window_attention_grad: {name} is {array.dtype}, q {q.dtype}; the kernel takes {' or '.join(DTYPES)}, "
                "one of them for q, out, d_out and pool"
            )
    if q.shape[2] not in HEAD_SIZES:
        raise ValueError(f"window_attention_grad: head size {q.shape[2]}; the kernel takes 64 and 128")
    if pool.shape[2] != work.TILE:
        raise ValueError(f"window_attention_grad: pages of {pool.shape[2]} rows; the kernel takes {work.TILE}")
