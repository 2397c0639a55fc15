"""Decode rows and tiles of chunks in one call: what each kind attends to, and how the two are attended to apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sequences(NamedTuple):
    """Of every tile, or row, what ``api.paged_attention`` says.

    Attributes:
        tables: [tiles, pages_per_sequence] int32; positions, lengths: [tiles] int32.
        plan: of ``api.plan_paged_attention`` for these positions and lengths; None computes it in the call.
    """

    tables: jax.Array
    positions: jax.Array
    lengths: jax.Array
    plan: Any = None


def apart(attend, q, pool, layer, rows: Sequences, tiles: Sequences, **options):
    """``api.mixed_paged_attention`` by two calls of a ``paged_attention``, between copies of q and of the results."""
    (slots, *heads), first = q.shape, len(rows.lengths)
    of_rows, rows_lse = attend(q[:first, None], pool, layer, *rows[:3], plan=rows.plan, **options)
    queries = q[first:].reshape(len(tiles.lengths), -1, *heads)
    of_tiles, tiles_lse = attend(queries, pool, layer, *tiles[:3], plan=tiles.plan, **options)
    out = jnp.concatenate([of_rows[:, 0], of_tiles.reshape(slots - first, *heads)])
    return out, rows_lse[:, 0], tiles_lse
