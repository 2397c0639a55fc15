"""The specification of paged attention, in plain jnp, with an online softmax over pieces of the context."""

import functools

import jax.numpy as jnp
from jax import lax

PIECE_PAGES = 2
"""Pages of context taken at a time. Measured on 2 CPU cores with SmolLM2-135M shapes, 8 rows, context 100: 164, 135
and 213 us for 1, 2 and 4 pages; at context 1000 two pages are within 10 % of four."""

LOWEST = -1e30
"""Stands for a score of minus infinity; finite, so that the difference of two of them is not NaN."""

einsum = functools.partial(jnp.einsum, precision="highest")  # float32 products stay float32 on every backend


def paged_attention(q, pool, layer, tables, positions, lengths, *, kv_heads, scale):
    """See ``api.paged_attention``. Online softmax: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3."""
    tiles, queries, heads, head_size = q.shape
    page_tokens = pool.shape[2]
    piece_tokens = PIECE_PAGES * page_tokens
    grouped = q.reshape(tiles, queries, kv_heads, heads // kv_heads, head_size).astype(jnp.float32) * scale
    row = jnp.arange(queries)
    # Position up to which each query sees keys; -1 for the rows beyond the length of their tile.
    last_key = jnp.where(row < lengths[:, None], positions[:, None] + row, -1)
    context = last_key.max(axis=1) + 1

    def attend_to_piece(index, carry):
        highest, total, weighted = carry
        page_ids = jnp.take(tables, index * PIECE_PAGES + jnp.arange(PIECE_PAGES), axis=1, mode="clip")
        rows = pool.at[layer, page_ids].get(mode="clip").astype(jnp.float32)
        k, v = jnp.moveaxis(rows.reshape(tiles, piece_tokens, 2, kv_heads, head_size), 2, 0)
        key = index * piece_tokens + jnp.arange(piece_tokens)
        seen = (key <= last_key[..., None])[:, None, None]
        v = jnp.where((key < context[:, None])[..., None, None], v, 0.0)  # 0 * NaN would be NaN
        scores = jnp.where(seen, einsum("nqhgd,nkhd->nhgqk", grouped, k), LOWEST)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_highest[..., None]), 0.0)
        decay = jnp.exp(highest - new_highest)
        weighted = weighted * decay[..., None] + einsum("nhgqk,nkhd->nhgqd", weights, v)
        return new_highest, total * decay + weights.sum(axis=-1), weighted

    pieces = (context.max() + piece_tokens - 1) // piece_tokens
    # full_like takes over the mesh axes over which q varies; a plain jnp.zeros would not fit the loop inside shard_map.
    per_query = functools.partial(jnp.full_like, q, dtype=jnp.float32)
    shape = (tiles, kv_heads, heads // kv_heads, queries)
    start = (per_query(LOWEST, shape=shape), per_query(0, shape=shape), per_query(0, shape=(*shape, head_size)))
    highest, total, weighted = lax.fori_loop(0, pieces, attend_to_piece, start)
    attended = total > 0
    out = weighted / jnp.where(attended, total, 1.0)[..., None]
    lse = jnp.where(attended, highest + jnp.log(jnp.where(attended, total, 1.0)), 0.0)
    out = jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)
    return out, jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])
