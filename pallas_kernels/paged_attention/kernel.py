"""The Mosaic GPU (Hopper) implementation: one kernel for decode rows, one for chunks; and what they take."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.chunk import ChunkPlan, paged_attention_chunk, plan_chunk
from pallas_kernels.paged_attention.decode import paged_attention_decode
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
    _, queries, query_heads, head_size = q.shape
    _check_sizes(queries, query_heads, kv_heads, head_size)
    _check_values(q, pool)
    options = {"kv_heads": kv_heads, "scale": scale, "interpret": interpret}
    if queries != 1:
        _check_scale(scale)
        return paged_attention_chunk(q, pool, layer, tables, plan or plan_chunk(positions, lengths), **options)
    if plan is None:
        sizes = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
        plan = _plan(positions, lengths, queries=1, interpret=interpret, **sizes)
    return paged_attention_decode(q, pool, layer, tables, plan, **options)


_plan = plan
"""Under a name that the argument ``plan`` does not hide."""


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
