"""Paged attention as callers use it: arguments checked, implementation named, and the plan of a step."""

import functools
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.paged_attention import kernel, reference
from pallas_kernels.paged_attention.mixed import Sequences, apart


def _reference(*arrays, plan, **options):
    """The reference needs no plan."""
    return reference.paged_attention(*arrays, **options)


IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": _reference,
        "mosaic_gpu": kernel.paged_attention,
        "mosaic_gpu_interpreted": functools.partial(kernel.paged_attention, interpret=INTERPRETER),
    }
)

MIXED = MappingProxyType(
    {
        "reference": functools.partial(apart, _reference),
        "mosaic_gpu": kernel.mixed_paged_attention,
        "mosaic_gpu_interpreted": functools.partial(kernel.mixed_paged_attention, interpret=INTERPRETER),
    }
)

PLANS = MappingProxyType(
    {
        "reference": lambda *_, **__: None,
        "mosaic_gpu": kernel.plan,
        "mosaic_gpu_interpreted": functools.partial(kernel.plan, interpret=INTERPRETER),
    }
)
"""Of every implementation, what computes its plan."""


def plan_paged_attention(
    positions,
    lengths,
    *,
    queries: int,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    implementation: str = "reference",
):
    """What ``paged_attention`` can know before it sees a layer; computed once a step, used by all layers.

    Args:
        positions, lengths: as for ``paged_attention``.
        queries, query_heads, head_size: last three axes of q.

    Returns:
        A pytree of arrays to pass as ``plan``; None where there is nothing to plan.

    Raises:
        ValueError: sizes that the implementation does not take, or an unknown implementation.
    """
    run = choose("plan_paged_attention", PLANS, implementation)
    sizes = {"queries": queries, "query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
    return run(positions, lengths, **sizes)


def paged_attention(
    q,
    pool,
    layer,
    tables,
    positions,
    lengths,
    *,
    kv_heads: int,
    scale: float,
    implementation: str = "reference",
    plan=None,
):
    """Causal attention of tiles of queries to the contexts that their page tables name.

    Query i of tile n stands at position ``positions[n] + i`` of its sequence and attends to keys 0 .. positions[n] + i,
    itself included: its own K/V row must have been written. Key position s lies in page ``tables[n, s // page]`` at
    offset ``s % page``. Query head h uses K/V head ``h // (query_heads // kv_heads)``.

    Args:
        q: [tiles, queries, query_heads, head_size]; one query a tile for decode rows, 64 for chunks.
        pool: [layers, pages, page, 2 * kv_heads * head_size]; a row reshapes to (2, kv_heads, head_size): K, then V.
        layer: int32 scalar, may be traced.
        tables: [tiles, pages_per_sequence] int32; entries beyond a tile's context may hold anything.
        positions: [tiles] int32, position of a tile's first query; ``positions + lengths`` must not exceed
            ``pages_per_sequence * page``.
        lengths: [tiles] int32, queries of the tile that are there; 0 for an inactive tile.
        scale: factor on the scores, commonly head_size ** -0.5.
        implementation: "mosaic_gpu" takes bfloat16 or float16, head sizes 64 and 128, pages of 64 rows, and one or 64
            queries a tile; decode rows come in groups of at most 8 query heads, chunks need a scale above 0.
        plan: of ``plan_paged_attention`` for the same positions, lengths and implementation; None computes it here.

    Returns:
        out: like q; softmax in float32.
        lse: [tiles, queries, query_heads] float32, natural logarithm of the sum of exponentials of the scaled scores.
        Both are exactly 0 for queries beyond their tile's length, so nothing that is not finite ever leaves. Rows of
        the pool outside the contexts do not matter, whatever they hold (NaN too).

    Raises:
        ValueError: shapes that do not fit together or that the implementation does not take, or an unknown
            implementation.
    """
    _check_heads(q, pool, kv_heads)
    _check_tiles(len(q), tables, positions, lengths)
    run = choose("paged_attention", IMPLEMENTATIONS, implementation)
    return run(q, pool, layer, tables, positions, lengths, kv_heads=kv_heads, scale=scale, plan=plan)


def mixed_paged_attention(
    q,
    pool,
    layer,
    rows: Sequences,
    tiles: Sequences,
    *,
    kv_heads: int,
    scale: float,
    implementation: str = "reference",
):
    """``paged_attention`` of decode rows and of the tiles behind them, one after the other on an axis of slots.

    Args:
        q: [rows + tiles * queries, query_heads, head_size]; one query a row.
        pool, layer, kv_heads, scale: as for ``paged_attention``.
        rows, tiles: what their queries attend to; at least one of each.
        implementation: as for ``paged_attention``; "mosaic_gpu" copies q and out unless the tiles, of 64 queries, begin
            behind a multiple of 8 rows.

    Returns:
        out: like q. lse of the rows: [rows, query_heads] float32; of the tiles: [tiles, queries, query_heads] float32.
        As ``paged_attention`` has them.

    Raises:
        ValueError: as ``paged_attention``, and slots that are not as many for every tile.
    """
    _check_heads(q, pool, kv_heads)
    _check_slots(len(q), len(rows.lengths), len(tiles.lengths))
    for part in rows, tiles:
        _check_tiles(len(part.lengths), *part[:3])
    run = choose("mixed_paged_attention", MIXED, implementation)
    return run(q, pool, layer, rows, tiles, kv_heads=kv_heads, scale=scale)


def _check_slots(slots: int, rows: int, tiles: int):
    if not rows or not tiles or slots <= rows or (slots - rows) % tiles:
        raise ValueError(
            f"mixed_paged_attention: {slots} slots are not {rows} rows and as many queries for each of {tiles} tiles"
        )


def _check_heads(q, pool, kv_heads):
    heads, head_size = q.shape[-2:]
    if heads % kv_heads:
        raise ValueError(f"paged_attention: {heads} query heads are not a multiple of {kv_heads} K/V heads")
    if pool.shape[-1] != 2 * kv_heads * head_size:
        raise ValueError(
            f"paged_attention: rows of the pool have {pool.shape[-1]} values; K and V of {kv_heads} heads of "
            f"{head_size} need {2 * kv_heads * head_size}"
        )


def _check_tiles(tiles: int, tables, positions, lengths):
    for name, array in (("tables", tables), ("positions", positions), ("lengths", lengths)):
        if array.shape[0] != tiles:
            raise ValueError(f"paged_attention: {name} has {array.shape[0]} entries for {tiles} tiles")
