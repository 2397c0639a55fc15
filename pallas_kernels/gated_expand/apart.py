"""The gated expansion in two operations: ``lora_expand`` of gate and up, in place, then the compiler's activation."""

from pallas_kernels.gated_expand.reference import activated
from pallas_kernels.lora_expand import kernel


def gated_expand(y, low, b, layer, indices, owner, scale, kept, *, plan=None, interpret=None):
    """See ``api.gated_expand``. Gate and up are kept of every slot, whatever ``kept`` says."""
    width = b.shape[2] // 2
    options = dict(widths=(width, width), plan=plan, interpret=interpret)
    y = kernel.lora_expand(y, low, b, layer, indices, owner, scale, **options)
    return activated(y, width), y
