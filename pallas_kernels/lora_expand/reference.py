"""The specification of the low-rank expansion: masked dense products."""

import itertools

import jax.numpy as jnp


def lora_expand(y, low, b, layer, indices, owner, scale, *, widths, residual=None):
    """See ``api.lora_expand``."""
    rank, out = b.shape[1], sum(widths)
    if low is None:
        low = y[:, out:]
    has_adapter = (indices > 0)[:, None]
    own = (jnp.repeat(owner, rank // owner.shape[0]) == indices[:, None]) & has_adapter
    scaled = low.astype(jnp.float32) * scale[indices][:, None]
    scaled = jnp.where(jnp.tile(own, len(widths)), scaled, 0.0).astype(y.dtype)
    ends = list(itertools.accumulate(widths))
    parts = [
        _product(scaled[:, module * rank : (module + 1) * rank], b[layer, :, end - width : end])
        for module, (width, end) in enumerate(zip(widths, ends, strict=True))
    ]
    total = y[:, :out].astype(jnp.float32) + jnp.concatenate(parts, axis=1)
    expanded = jnp.where(has_adapter, total.astype(y.dtype), y[:, :out])
    return jnp.concatenate([expanded, y[:, out:]], axis=1) if residual is None else residual + expanded


def _product(low, b):
    return jnp.einsum("tr,ro->to", low, b, precision="highest", preferred_element_type=jnp.float32)
