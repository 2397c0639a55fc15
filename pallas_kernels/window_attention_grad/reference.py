"""The specification of the window's attention gradient, in plain jnp, over groups of key blocks."""

import functools

import jax.numpy as jnp
from jax import lax

GROUP_BLOCKS = 4
"""Key blocks taken at a time. Measured on 2 CPU cores with SmolLM2-135M shapes, the last 256 tokens of 1024: 7.5, 6.3
and 5.9 ms for 1, 2 and 4 blocks; with 256 tokens of context it makes no difference."""

einsum = functools.partial(jnp.einsum, precision="highest")  # float32 products stay float32 on every backend


def window_attention_grad(
    q, out, lse, d_out, pool, layer, tables, block_starts, first_block, d_k, d_v, *, kv_heads, scale
):
    """See ``api.window_attention_grad``. Formulas: FlashAttention-2, arXiv 2307.08691, algorithm 2."""
    block, group = pool.shape[2], min(GROUP_BLOCKS, tables.shape[0])
    heads_first = functools.partial(_heads_first, kv_heads=kv_heads)
    scaled_q, d_out_of_head, lse = heads_first(q) * scale, heads_first(d_out), heads_first(lse)
    delta = (heads_first(out) * d_out_of_head).sum(axis=-1, keepdims=True)
    slot = first_block * block + jnp.arange(q.shape[0])
    first_key = jnp.take(block_starts, slot // block) * block
    active = (d_out != 0).any(axis=(1, 2))  # other queries contribute nothing, whatever their out and lse hold

    def pull_back_group(index, carry):
        d_q, d_k, d_v = carry
        wanted = earliest + index * group
        start = jnp.minimum(wanted, tables.shape[0] - group)  # of 6 blocks: 0..3, then 2..5 of which 4 and 5 count
        key = start * block + jnp.arange(group * block)
        seen = (key <= slot[:, None]) & (key >= jnp.maximum(first_key, wanted * block)[:, None]) & active[:, None]
        rows = pool.at[layer, lax.dynamic_slice_in_dim(tables, start, group)].get(mode="clip").astype(jnp.float32)
        rows = rows.reshape(group * block, 2, kv_heads, q.shape[-1])
        k, v = jnp.moveaxis(jnp.where(seen.any(axis=0)[:, None, None, None], rows, 0.0), 1, 0)  # 0 * NaN would be NaN
        weights = jnp.where(seen, jnp.exp(einsum("hgqd,khd->hgqk", scaled_q, k) - lse), 0.0)
        d_weights = einsum("hgqd,khd->hgqk", d_out_of_head, v)
        d_scores = jnp.where(seen, weights * (d_weights - delta), 0.0)
        d_k = _add_rows(d_k, einsum("hgqk,hgqd->khd", d_scores, scaled_q), start * block)
        d_v = _add_rows(d_v, einsum("hgqk,hgqd->khd", weights, d_out_of_head), start * block)
        return d_q + einsum("hgqk,khd->hgqd", d_scores, k), d_k, d_v

    end = first_block + q.shape[0] // block
    earliest = jnp.min(first_key, where=active, initial=end * block) // block
    groups = (end - earliest + group - 1) // group  # none if no query is active
    d_q, d_k, d_v = lax.fori_loop(0, groups, pull_back_group, (jnp.zeros_like(scaled_q), d_k, d_v))
    return (jnp.moveaxis(d_q, 2, 0).reshape(q.shape) * scale).astype(q.dtype), d_k, d_v


def _heads_first(x, kv_heads):
    """[tokens, query_heads, ...] to [kv_heads, query_heads of each, tokens, ... or 1] in float32."""
    x = x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, -1).astype(jnp.float32)
    return jnp.moveaxis(x, 0, 2)


def _add_rows(total, rows, start):
    """``total`` with ``rows`` added from row ``start`` on."""
    sums = lax.dynamic_slice_in_dim(total, start, rows.shape[0]) + rows
    return lax.dynamic_update_slice_in_dim(total, sums, start, axis=0)
