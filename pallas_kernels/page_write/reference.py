"""The specification of the page write: one scatter of whole rows."""

import jax.numpy as jnp


def page_write(pool, layer, rows, slots):
    """See ``api.page_write``."""
    layers, pages, page_tokens, width = pool.shape
    # Dropped rows go to distinct places past the end, so that the promise of unique indices holds for them too:
    # 100 slots in the pool, slots = [7, -1, 42, -1]  ->  [7, 101, 42, 103].
    slots = jnp.where(slots < 0, pages * page_tokens + jnp.arange(slots.shape[0], dtype=jnp.int32), slots)
    flat = pool.reshape(layers, pages * page_tokens, width)
    return flat.at[layer, slots].set(rows, mode="drop", unique_indices=True).reshape(pool.shape)
