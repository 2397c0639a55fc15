"""The specification of an adapter's gradients: the products of the forward pass, transposed."""

import functools
import itertools

import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def grouped_lora_grad(x, d_y, a, b, scale, h, d_x_base, *, widths):
    """See ``api.grouped_lora_grad``. The products of y = h b and h = scale * x a, transposed, module by module."""
    rank, ends = b.shape[0], list(itertools.accumulate(widths))
    h = (einsum("ti,ir->tr", x, a) * scale).astype(x.dtype) if h is None else h
    d_a, d_b, d_x = [], [], 0.0
    for j, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = slice(j * rank, (j + 1) * rank)
        d_y_own, b_own = d_y[:, start:end], b[:, start:end]
        d_h = (einsum("to,ro->tr", d_y_own, b_own) * scale).astype(x.dtype)
        d_a.append(einsum("ti,tr->ir", x, d_h))
        d_b.append(einsum("tr,to->ro", h[:, own], d_y_own))
        d_x += einsum("tr,ir->ti", d_h, a[:, own])
    d_x = d_x.astype(x.dtype)
    return jnp.concatenate(d_a, axis=1), jnp.concatenate(d_b, axis=1), d_x if d_x_base is None else d_x_base + d_x
