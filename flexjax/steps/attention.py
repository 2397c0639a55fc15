"""Attention of a forward step: where the token axis comes apart into decode rows and tiles, and meets the pages."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.models.decoder import DecoderLayer
from flexjax.steps.kernels import Kernels
from flexjax.steps.tape import tile_slots
from pallas_kernels import page_write, paged_attention


def token_positions(batch: SimpleNamespace, layout: SlotLayout) -> jax.Array:
    """Position in its sequence of every slot, [slots] int32; idle slots get some valid position."""
    rows = jnp.maximum(batch.row_position, 0)
    if not layout.chunk:
        return rows
    tiles = batch.tile_position[:, None] + jnp.arange(PAGE_TOKENS, dtype=jnp.int32)
    return jnp.concatenate([rows, tiles.reshape(-1)])


def key_value_slots(batch: SimpleNamespace, layout: SlotLayout) -> jax.Array:
    """Row of the pool that takes each slot's keys and values, [slots] int32, -1 for idle slots.

    Tiles write whole pages: what lies beyond a partial tile's length is finite and is overwritten before it is read.
    """
    position = jnp.maximum(batch.row_position, 0)
    page = jnp.take_along_axis(batch.row_pages, position[:, None] // PAGE_TOKENS, axis=1)[:, 0]
    rows = jnp.where(batch.row_position < 0, -1, page * PAGE_TOKENS + position % PAGE_TOKENS)
    if not layout.chunk:
        return rows
    page = jnp.take_along_axis(batch.tile_pages, batch.tile_position[:, None] // PAGE_TOKENS, axis=1)[:, 0]
    tiles = tile_slots(jnp.where(batch.tile_length > 0, page, -1))
    return jnp.concatenate([rows, tiles.reshape(-1)])


def write_keys_values(pool, layer, slots, k, v, kernels: Kernels):
    """k and v [slots, Hkv, D] into the pool [layers, pages, 64, 2 Hkv D]."""
    rows = jnp.concatenate([k, v], axis=1).reshape(len(k), -1)
    return page_write(pool, layer, rows, slots, implementation=kernels.page_write)


def attend(layer: DecoderLayer, q, pool, index, batch: SimpleNamespace, layout: SlotLayout, kernels: Kernels):
    """q [slots, Hq, D] against the pages of each row or tile -> (attention [slots, Hq, D], log-sum-exp [slots, Hq])."""
    heads, width = q.shape[1:]
    options = dict(kv_heads=layer.kv_heads, scale=width**-0.5, implementation=kernels.paged_attention)
    active = (batch.row_position >= 0).astype(jnp.int32)
    rows, rows_lse = paged_attention(
        q[: layout.rows, None], pool, index, batch.row_pages, jnp.maximum(batch.row_position, 0), active, **options
    )
    if not layout.chunk:
        return rows[:, 0], rows_lse[:, 0]
    queries = q[layout.rows :].reshape(layout.tiles, PAGE_TOKENS, heads, width)
    tiles, tiles_lse = paged_attention(
        queries, pool, index, batch.tile_pages, batch.tile_position, batch.tile_length, **options
    )
    out = jnp.concatenate([rows[:, 0], tiles.reshape(layout.chunk, heads, width)])
    return out, jnp.concatenate([rows_lse[:, 0], tiles_lse.reshape(layout.chunk, heads)])
