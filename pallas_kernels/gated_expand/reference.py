"""The specification: ``lora_expand`` of gate and up, then silu of one times the other."""

import jax

from pallas_kernels.lora_expand import reference


def gated_expand(y, low, b, layer, indices, owner, scale, kept):
    """See ``api.gated_expand``. What is not kept is expanded as well."""
    width = b.shape[2] // 2
    y = reference.lora_expand(y, low, b, layer, indices, owner, scale, widths=(width, width))
    return activated(y, width), y


def activated(y, width):
    """silu(gate) * up, of gate and up in the leading columns of y."""
    return jax.nn.silu(y[:, :width]) * y[:, width : 2 * width]
