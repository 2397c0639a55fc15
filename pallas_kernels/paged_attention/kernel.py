"""The Mosaic GPU (Hopper) implementation: one kernel for decode rows, one for chunks; and what they take."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.chunk import ChunkPlan, paged_attention_chunk, plan_chunk
from pallas_kernels.paged_attention.chunk_tiling import ALIGNMENT
from pallas_kernels.paged_attention.decode import paged_attention_decode
from pallas_kernels.paged_attention.mixed import Sequences, apart
from pallas_kernels.paged_attention.plan import Plan, plan_decode
from pallas_kernels.paged_attention.tiling import GROUP, INTERPRETED_MULTIPROCESSORS, KEYS, TILINGS, multiprocessors

QUERIES = (1, 64)
"""A decode row and a tile of a chunk."""


def plan(positions, lengths, *, queries, query_heads, kv_heads, head_size, interpret=None) -> Plan | ChunkPlan:
    """See ``api.plan_paged_attention``."""
    _check_sizes(queries, query_heads, kv_heads, head_size)
    if queries != 1:
        return plan_chunk(positions, lengths)
    blocks = INTERPRETED_MULTIPROCESSORS if interpret else multiprocessors()
    return plan_decode(positions, lengths, kv_heads=kv_heads, workers=blocks * TILINGS[head_size].streams)


def paged_attention(q, pool, layer, tables, positions, lengths, *, kv_heads, scale, plan, interpret=None):
    """See ``api.paged_attention``."""
    tiles, queries, *heads = q.shape
    sequences = Sequences(tables, positions, lengths, plan)
    _check_sizes(queries, heads[0], kv_heads, heads[1])
    run = _decode if queries == 1 else _chunk
    slots = q.reshape(tiles * queries, *heads)
    out, lse = run(slots, pool, layer, sequences, kv_heads=kv_heads, scale=scale, interpret=interpret)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def mixed_paged_attention(q, pool, layer, rows, tiles, *, interpret=None, **options):
    """See ``api.mixed_paged_attention``: the kernel of rows makes the result, that of tiles adds to it in place."""
    slots, query_heads, head_size = q.shape
    first = len(rows.lengths)
    queries = (slots - first) // len(tiles.lengths)
    if queries == 1 or first % ALIGNMENT:
        return apart(paged_attention, q, pool, layer, rows, tiles, interpret=interpret, **options)
    for each in 1, queries:
        _check_sizes(each, query_heads, options["kv_heads"], head_size)
    out, rows_lse = _decode(q, pool, layer, rows, interpret=interpret, **options)
    out, tiles_lse = _chunk(q, pool, layer, tiles, before=out, interpret=interpret, **options)
    return out, rows_lse, tiles_lse


def _decode(q, pool, layer, rows: Sequences, *, kv_heads, scale, interpret):
    _check_values(q, pool)
    sizes = {"query_heads": q.shape[1], "kv_heads": kv_heads, "head_size": q.shape[2]}
    made = rows.plan or plan(rows.positions, rows.lengths, queries=1, interpret=interpret, **sizes)
    options = {"kv_heads": kv_heads, "scale": scale, "interpret": interpret}
    return paged_attention_decode(q, pool, layer, rows.tables, made, **options)


def _chunk(q, pool, layer, tiles: Sequences, *, scale, **options):
    _check_values(q, pool)
    _check_scale(scale)
    made = tiles.plan or plan_chunk(tiles.positions, tiles.lengths)
    return paged_attention_chunk(q, pool, layer, tiles.tables, made, scale=scale, **options)


def _check_sizes(queries, query_heads, kv_heads, head_size):
    if queries not in QUERIES:
        raise ValueError(f"paged_attention: tiles of {queries} queries; the Mosaic GPU kernels take 1 or 64")
    if head_size not in TILINGS:
        raise ValueError(f"paged_attention: head size {head_size}; the Mosaic GPU kernels take 64 or 128")
    if queries == 1 and query_heads > GROUP * kv_heads:
        raise ValueError(
            f"paged_attention: {query_heads} query heads share {kv_heads} K/V heads; the Mosaic GPU kernel of "
            f"decode rows takes at most {GROUP} for each"
        )


def _check_values(q, pool):
    for name, array in (("q", q), ("pool", pool)):
        if array.dtype not in (jnp.bfloat16, jnp.float16) or array.dtype != q.dtype:
            raise ValueError(
                f"paged_attention: {name} is {array.dtype}; the Mosaic GPU kernels take q and pool both bfloat16 "
                "or both float16"
            )
    if pool.shape[2] != KEYS:
        raise ValueError(f"paged_attention: pages of {pool.shape[2]} rows; the Mosaic GPU kernels take {KEYS}")


def _check_scale(scale):
    if scale <= 0:
        raise ValueError(f"paged_attention: scale {scale}; the Mosaic GPU kernel of chunks needs more than 0")
