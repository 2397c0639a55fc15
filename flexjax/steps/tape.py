"""The tape: saved activations of a finetuning microbatch, kept as rows of the page pool, written by 64-token tiles."""

import jax
import jax.numpy as jnp

from flexjax.layout import PAGE_TOKENS
from flexjax.models.sharding import gathered_columns, own_columns
from flexjax.state import TapeLayout
from pallas_kernels import page_write


def tile_slots(pages: jax.Array) -> jax.Array:
    """Row numbers of whole pages: pages [...] int32 (negative: none) -> [..., 64], page * 64 + offset or -1."""
    slots = pages[..., None] * PAGE_TOKENS + jnp.arange(PAGE_TOKENS, dtype=jnp.int32)
    return jnp.where(pages[..., None] < 0, -1, slots)


def as_rows(value: jax.Array, row: int) -> jax.Array:
    """value [T, n] -> [T / 64, columns, 64, row]: each tile's values cut into page rows, zero-padded.

        token 0  | v0 v1 v2 v3 v4 |      column 0: v0 v1 v2     (row = 3)
                                         column 1: v3 v4 0
    """
    tokens, width = value.shape
    columns = -(-width // row)
    padded = jnp.pad(value, ((0, 0), (0, columns * row - width)))
    return padded.reshape(tokens // PAGE_TOKENS, PAGE_TOKENS, columns, row).swapaxes(1, 2)


def from_rows(rows: jax.Array, width: int) -> jax.Array:
    """Inverse of `as_rows`: [tiles, columns, 64, row] -> [tiles * 64, width]."""
    tiles, columns, tokens, row = rows.shape
    return rows.swapaxes(1, 2).reshape(tiles * tokens, columns * row)[:, :width]


def write(pool, layer, pages, value, *, implementation: str):
    """value [T, n] into the columns named by pages [T / 64, columns] (negative: skipped) of one layer of the pool."""
    rows = as_rows(value, pool.shape[-1])
    slots = tile_slots(pages).reshape(-1)
    return page_write(pool, layer, rows.reshape(-1, pool.shape[-1]), slots, implementation=implementation)


def read(pool, layer, pages, width: int) -> jax.Array:
    """pages [tiles, columns] -> [tiles * 64, width]; zeros where a page is negative, so that no old number gets in."""
    rows = pool[layer, jnp.maximum(pages, 0)]
    return from_rows(jnp.where(pages[..., None, None] < 0, 0, rows), width)


def write_named(pool, layer, tape: TapeLayout, pages, values: dict[str, jax.Array], *, tp: int, implementation: str):
    """Write those of the values, each [tiles * 64, width], that the tape keeps, in one go; pages [tiles, columns]."""
    row, kept = pool.shape[-1], [name for name in tape.names if name in values]
    if not kept:
        return pool
    rows = jnp.concatenate([as_rows(local_part(values[name], name, tp), row) for name in kept], axis=1)
    spans = [pages[:, tape.first_column(name) :][:, : tape.span(name)] for name in kept]
    slots = tile_slots(jnp.concatenate(spans, axis=1))
    return page_write(pool, layer, rows.reshape(-1, row), slots.reshape(-1), implementation=implementation)


def read_named(pool, layer, tape: TapeLayout, pages, *, tp: int) -> dict[str, jax.Array]:
    """Every value that the tape keeps, flat: name -> [tiles * 64, width]."""
    values = {}
    for name, width in zip(tape.names, tape.widths, strict=True):
        first = tape.first_column(name)
        local = read(pool, layer, pages[:, first : first + tape.span(name)], width)
        values[name] = whole(local, name, tp)
    return values


REPLICATED = frozenset({"x", "mid"})
"""Names that every shard computes whole; each shard keeps its share of the columns."""


def local_part(value: jax.Array, name: str, tp: int) -> jax.Array:
    return own_columns(value, tp) if tp > 1 and name in REPLICATED else value


def whole(value: jax.Array, name: str, tp: int) -> jax.Array:
    return gathered_columns(value) if tp > 1 and name in REPLICATED else value


def pack_attention(attention: jax.Array, lse: jax.Array) -> jax.Array:
    """attention [T, H, D], lse [T, H] float32 -> [T, n] in attention's dtype. In two-byte dtypes the log-sum-exp is
    kept as a sum of two halves (an error of 2^-17 of its value), never as raw bits, which could read as NaN."""
    flat = attention.reshape(len(attention), -1)
    if attention.dtype.itemsize == 4:
        return jnp.concatenate([flat, lse.astype(flat.dtype)], axis=-1)
    high = lse.astype(flat.dtype)
    low = (lse - high.astype(jnp.float32)).astype(flat.dtype)
    return jnp.concatenate([flat, high, low], axis=-1)


def unpack_attention(value: jax.Array, heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    flat, extra = jnp.split(value, [heads * head_dim], axis=-1)
    lse = sum(half.astype(jnp.float32) for half in jnp.split(extra, extra.shape[-1] // heads, axis=-1))
    return flat.reshape(len(value), heads, head_dim), lse
