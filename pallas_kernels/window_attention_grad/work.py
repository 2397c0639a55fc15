"""Which keys and queries of a window meet: an item of work for every pair of key blocks of a sequence."""

import jax.numpy as jnp
from jax import lax

TILE = 64
"""Slots of a block."""

COLUMNS = 7
BLOCK, FIRST_PAGE, SECOND_PAGE, LIMIT, FIRST_TILE, TILES, FIRST_QUERY = range(COLUMNS)
"""Columns of the items."""


def items(active, tables, block_starts, first_block):
    """Items [blocks, 7] int32, those with most tiles first; the last ones may have no tile at all.

        a sequence in blocks 2 .. 4 and a window of blocks 3 .. 5, block 5 padding:
        BLOCK 2 (and 3)   tiles 0 .. 1 of the window
        BLOCK 4           tile 1; the item's second block lies past the limit

    Args:
        active: [window, query_heads] bool, queries with a cotangent. tables, block_starts: [blocks] int32.
        first_block: int32 scalar, first block of the window.

    Columns:
        BLOCK: first of the pair of key blocks. FIRST_PAGE, SECOND_PAGE: their pages. LIMIT: slot of the microbatch from
        which on no active query of the sequence lies. FIRST_TILE, TILES: blocks of the window that see the pair.
        FIRST_QUERY: the first of them as a block of the microbatch.
    """
    block = jnp.arange(tables.shape[0], dtype=jnp.int32)
    limit = _limits(active, block_starts, first_block)
    first = jnp.maximum(block, first_block)
    begins_pair = (block - block_starts) % 2 == 0
    tiles = jnp.where(begins_pair, jnp.maximum((limit + TILE - 1) // TILE - first, 0), 0)
    second_page = jnp.append(tables[1:], tables[-1:])
    columns = jnp.stack((block, tables, second_page, limit, first - first_block, tiles, first), axis=1)
    return columns.astype(jnp.int32)[_longest_first(tiles)]


def _limits(active, block_starts, first_block):
    """Of every block [blocks]: the slot behind the last active query of its sequence in the window, or 0."""
    slot = first_block * TILE + jnp.arange(active.shape[0], dtype=jnp.int32)
    ends = jnp.max(jnp.where(active, slot[:, None] + 1, 0).reshape(-1, TILE * active.shape[1]), axis=1)
    starts = lax.dynamic_slice_in_dim(block_starts, first_block, ends.shape[0])
    return jnp.max(jnp.where(starts == block_starts[:, None], ends, 0), axis=1)


def _longest_first(tiles):
    """Order of falling ``tiles``, by counting: XLA's sort takes several launches."""
    block = jnp.arange(tiles.shape[0], dtype=jnp.int32)
    before = (tiles > tiles[:, None]) | ((tiles == tiles[:, None]) & (block < block[:, None]))
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank == block[:, None], block, 0), axis=1, dtype=jnp.int32)
