"""The specification of the grouped low-rank product (masked dense products) and of one adapter's gradients."""

import functools

import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def grouped_lora(x, a, b, indices, owner, scale):
    """See ``api.grouped_lora``."""

    def products():
        owner_of_column = jnp.repeat(owner, a.shape[1] // owner.shape[0])
        own = (owner_of_column == indices[:, None]) & (indices > 0)[:, None]
        h = jnp.where(own, einsum("ti,ir->tr", x, a) * scale[indices][:, None], 0.0)
        return einsum("tr,ro->to", h.astype(x.dtype), b).astype(x.dtype)

    # The zero takes over the mesh axes over which the operands vary, as both branches must inside shard_map.
    zero = jnp.zeros_like(x[0, 0] + a[0, 0] + b[0, 0], x.dtype)
    return lax.cond((indices > 0).any(), products, lambda: jnp.broadcast_to(zero, (x.shape[0], b.shape[1])))


def grouped_lora_grad(x, d_y, a, b, scale):
    """See ``api.grouped_lora_grad``. The products of y = h b and h = scale * x a, transposed."""
    h = (einsum("ti,ir->tr", x, a) * scale).astype(x.dtype)
    d_h = (einsum("to,ro->tr", d_y, b) * scale).astype(x.dtype)
    d_a = einsum("ti,tr->ir", x, d_h)
    d_b = einsum("tr,to->ro", h, d_y)
    d_x = einsum("tr,ir->ti", d_h, a).astype(x.dtype)
    return d_a, d_b, d_x
