"""The specification of the page writes: one scatter of whole tiles after another."""

from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels.page_write.parts import Tiles


def write_parts(pool, layer, parts: Sequence[Tiles]):
    """See ``api.write_parts``."""
    for part in parts:
        pool = _write(pool, layer, part)
    return pool


def _write(pool, layer, part: Tiles):
    width = pool.shape[-1]
    flat = pool.reshape(len(pool), -1, part.rows, width)
    values = part.values[part.first_row : part.first_row + part.places.shape[0] * part.rows, : part.columns]
    whole, rest = divmod(part.columns, width)
    if whole:
        flat = _write_columns(flat, layer, values[:, : whole * width], part.places[:, :whole])
    if rest:
        flat = _write_columns(flat, layer, values[:, whole * width :], part.places[:, whole:])
    return flat.reshape(pool.shape)


def _write_columns(pool, layer, values, places):
    """values [tiles * rows, columns * n] of n values a place, at most the width; places [tiles, columns] of the pool
    [layers, places, rows, width]."""
    tiles, columns = places.shape
    cut = values.reshape(tiles, pool.shape[2], columns, -1).swapaxes(1, 2)
    cut = cut.reshape(tiles * columns, *cut.shape[2:])
    places = _unique_places(places.reshape(-1), pool.shape[1])
    return pool.at[layer, places, :, : cut.shape[-1]].set(cut, mode="drop", unique_indices=True)


def _unique_places(places, end):
    """Places that drop what goes there are distinct ones past the end, so that the promise of unique indices holds.

    100 places in the pool, places = [7, -1, 42, 100]  ->  [7, 101, 42, 103].
    """
    inside = (places >= 0) & (places < end)
    return jnp.where(inside, places, end + jnp.arange(places.shape[0], dtype=jnp.int32))
