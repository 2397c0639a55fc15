"""What the kernel must know of the slots, worked out by XLA: the same for every layer and product of a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64
"""Slots of a tile: the rows of one tensor-core product of a warpgroup."""

RANK_UNIT = 8
"""Columns of the flat rank axis that one entry of ``owner`` speaks for."""


def piece_columns(rank: int) -> int:
    """Columns of a piece of the rank axis, which one product multiplies: as narrow as tensor cores and copies allow."""
    return 16 if rank <= 16 else 32


class Plan(NamedTuple):
    """Slots in tiles, of which the first may have fewer than 64; and the rank axis in pieces.

    Attributes:
        slots: [tiles, 64] int32, adapter of each slot, 0 for none and past the end of the first tile.
        scale: [tiles, 64] float32, scale of that adapter, 0 for none.
        pieces: [tiles, 2] int32, the first piece of the rank axis that the tile's adapters own, and how many from there
            to the last one; no pieces where nothing is added.
        owner: [pieces, piece] int32, adapter that owns each column, -1 for nobody.
    """

    slots: jax.Array
    scale: jax.Array
    pieces: jax.Array
    owner: jax.Array


def plan_slots(indices, owner, scale) -> Plan:
    """See ``api.plan_lora_expand``."""
    piece = piece_columns(owner.shape[0] * RANK_UNIT)
    tiles = -(-indices.shape[0] // TILE)
    missing = tiles * TILE - indices.shape[0]
    head, rest = indices[: TILE - missing], indices[TILE - missing :]
    slots = jnp.concatenate([head, jnp.zeros(missing, jnp.int32), rest]).reshape(tiles, TILE)
    owner = jnp.where(owner > 0, owner, -1)
    owner = jnp.pad(owner, (0, -owner.shape[0] % (piece // RANK_UNIT)), constant_values=-1)
    by_piece = owner.reshape(-1, piece // RANK_UNIT)
    used = (slots[:, :, None, None] == by_piece).any(axis=(1, 3))
    first = jnp.argmax(used, axis=1)
    end = used.shape[1] - jnp.argmax(used[:, ::-1], axis=1)
    count = jnp.where(used.any(axis=1), end - first, 0)
    pieces = jnp.stack([first, count], axis=1).astype(jnp.int32)
    return Plan(slots, jnp.where(slots > 0, scale[slots], 0.0), pieces, jnp.repeat(by_piece, RANK_UNIT, axis=1))
