"""Attention of a forward step: where the token axis comes apart into decode rows and tiles, and meets the pages."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.models.decoder import DecoderLayer
from flexjax.steps.kernels import Kernels
from pallas_kernels import (
    Pages,
    Rows,
    Sequences,
    mixed_paged_attention,
    paged_attention,
    plan_paged_attention,
    write_parts,
)


def token_positions(batch: SimpleNamespace, layout: SlotLayout) -> jax.Array:
    """Position in its sequence of every slot, [slots] int32; idle slots get some valid position."""
    rows = jnp.maximum(batch.row_position, 0)
    if not layout.chunk:
        return rows
    tiles = batch.tile_position[:, None] + jnp.arange(PAGE_TOKENS, dtype=jnp.int32)
    return jnp.concatenate([rows, tiles.reshape(-1)])


@dataclass(frozen=True)
class Places:
    """Where what a step keeps goes, and how its attention is shared out: the same for every layer.

    Attributes:
        rows: [rows] int32, slot of the pool that takes each decode row's keys and values, -1 for idle rows.
        tiles: [tiles, 1] int32, page of each tile, -1 for idle ones; None without a chunk part. Tiles write whole
            pages: what lies beyond a partial tile's length is finite and is overwritten before it is read.
        row_plan, tile_plan: of `plan_paged_attention`.
        tape: of `flexjax.steps.tape.write_tables`; None in a step without one.
    """

    rows: jax.Array
    tiles: jax.Array | None
    row_plan: Any
    tile_plan: Any
    tape: dict[str, jax.Array] | None = None


def places_of(batch: SimpleNamespace, layout: SlotLayout, layer: DecoderLayer, kernels: Kernels) -> Places:
    position = jnp.maximum(batch.row_position, 0)
    page = jnp.take_along_axis(batch.row_pages, position[:, None] // PAGE_TOKENS, axis=1)[:, 0]
    rows = jnp.where(batch.row_position < 0, -1, page * PAGE_TOKENS + position % PAGE_TOKENS)
    heads = dict(query_heads=layer.query_heads, kv_heads=layer.kv_heads, head_size=layer.config.head_dim)
    plan = functools.partial(plan_paged_attention, **heads, implementation=kernels.paged_attention)
    row_plan = plan(*decode_queries(batch), queries=1)
    if not layout.chunk:
        return Places(rows, None, row_plan, None)
    page = jnp.take_along_axis(batch.tile_pages, batch.tile_position[:, None] // PAGE_TOKENS, axis=1)
    tile_plan = plan(batch.tile_position, batch.tile_length, queries=PAGE_TOKENS)
    return Places(rows, jnp.where(batch.tile_length[:, None] > 0, page, -1), row_plan, tile_plan)


def decode_queries(batch: SimpleNamespace) -> tuple[jax.Array, jax.Array]:
    """Position of every row's query, and 1 where there is one."""
    return jnp.maximum(batch.row_position, 0), (batch.row_position >= 0).astype(jnp.int32)


def write_keys_values(pool, layer, places: Places, k, v, kept: list[Pages], kernels: Kernels):
    """k and v [slots, Hkv, D] into the pool [layers, pages, 64, 2 Hkv D], and what else is kept."""
    rows = jnp.concatenate([k, v], axis=1).reshape(len(k), -1)
    tiles = [] if places.tiles is None else [Pages(rows, places.tiles, first_row=len(places.rows))]
    parts = [Rows(rows, places.rows), *tiles, *kept]
    return write_parts(pool, layer, parts, implementation=kernels.page_write)


def attend(layer: DecoderLayer, q, pool, index, batch, places: Places, layout: SlotLayout, kernels: Kernels):
    """q [slots, Hq, D] against the pages of each row or tile -> (attention [slots, Hq, D], log-sum-exp [chunk, Hq] of
    the tiles, None without a chunk part: a tape keeps it, and has none for rows)."""
    options = dict(kv_heads=layer.kv_heads, scale=q.shape[-1] ** -0.5, implementation=kernels.paged_attention)
    rows = Sequences(batch.row_pages, *decode_queries(batch), places.row_plan)
    if not layout.chunk:
        out, _ = paged_attention(q[:, None], pool, index, *rows[:3], plan=rows.plan, **options)
        return out[:, 0], None
    tiles = Sequences(batch.tile_pages, batch.tile_position, batch.tile_length, places.tile_plan)
    out, _, lse = mixed_paged_attention(q, pool, index, rows, tiles, **options)
    return out, lse.reshape(layout.chunk, -1)
