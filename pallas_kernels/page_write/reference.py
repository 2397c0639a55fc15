"""The specification of the page writes: scatters of whole rows, and of whole pages."""

import jax.numpy as jnp


def page_write(pool, layer, rows, slots):
    """See ``api.page_write``."""
    layers, pages, page_tokens, width = pool.shape
    flat = pool.reshape(layers, pages * page_tokens, width)
    slots = _unique_places(slots, pages * page_tokens)
    rows = rows[: slots.shape[0]]
    return flat.at[layer, slots].set(rows, mode="drop", unique_indices=True).reshape(pool.shape)


def write_pages(pool, layer, values, pages, *, first_row, columns):
    """See ``api.write_pages``."""
    width = pool.shape[-1]
    values = values[first_row : first_row + pages.shape[0] * pool.shape[2], :columns]
    whole, rest = divmod(values.shape[1], width)
    if whole:
        pool = _write_columns(pool, layer, values[:, : whole * width], pages[:, :whole])
    if rest:
        pool = _write_columns(pool, layer, values[:, whole * width :], pages[:, whole:])
    return pool


def _write_columns(pool, layer, values, pages):
    """values [tiles * page, columns * n] of n values a page, at most the width; pages [tiles, columns]."""
    tiles, columns = pages.shape
    cut = values.reshape(tiles, pool.shape[2], columns, -1).swapaxes(1, 2)
    cut = cut.reshape(tiles * columns, *cut.shape[2:])
    places = _unique_places(pages.reshape(-1), pool.shape[1])
    return pool.at[layer, places, :, : cut.shape[-1]].set(cut, mode="drop", unique_indices=True)


def _unique_places(places, end):
    """Places that drop what goes there are distinct ones past the end, so that the promise of unique indices holds.

    100 slots in the pool, slots = [7, -1, 42, 100]  ->  [7, 101, 42, 103].
    """
    inside = (places >= 0) & (places < end)
    return jnp.where(inside, places, end + jnp.arange(places.shape[0], dtype=jnp.int32))
