"""``grouped_lora_grad`` as callers use it: arguments checked, implementation named."""

import functools
from types import MappingProxyType

from pallas_kernels.grouped_lora import grad_kernel, reference
from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.grouped_lora_grad,
        "mosaic_gpu": grad_kernel.grouped_lora_grad,
        "mosaic_gpu_interpreted": functools.partial(grad_kernel.grouped_lora_grad, interpret=INTERPRETER),
    }
)

def grouped_lora_grad(x, d_y, a, b, scale, *, widths=None, h=None, d_x_base=None, implementation: str = "reference"):
    """Gradients of ``y = scale * (x a) b`` of one adapter, for one module or for several that share their input.

    Modules lie side by side, each of the adapter's rank r: module j has columns ``j * r`` to ``(j + 1) * r`` of a and
    h, and the next ``widths[j]`` columns of d_y and b; d_x is the sum over the modules.

    Args:
        x: [slots, in], d_y: [slots, out]; slots whose d_y is 0 contribute nothing (their x must be finite).
        a: [in, modules * r], b: [r, out] of the adapter, in the dtype of x.
        scale: float32 scalar, may be traced.
        widths: columns of each module in d_y; static, None for one module.
        h: [slots, modules * r] in the dtype of x, ``scale * x a`` where the forward pass left it; None computes it,
            which reads x once more.
        d_x_base: like x, what d_x is added to; None for nothing. Updated in place where it is not used again.

    Returns:
        d_a: [in, modules * r] float32, d_b: [r, out] float32, d_x: like x. Sums in float32, in no fixed order; ``x a``
        and the cotangent of it are rounded to the dtype of x, as the forward pass rounds the former, and so is d_x
        before it is added to d_x_base.

    Raises:
        ValueError: shapes that do not fit together, sizes or dtypes that the implementation does not take, or an
            unknown implementation.
    """
    widths = b.shape[1:] if widths is None else tuple(widths)
    _check("grouped_lora_grad", b, (b.shape[0], sum(widths)), "b")
    _check("grouped_lora_grad", d_y, (x.shape[0], b.shape[1]), "d_y")
    _check("grouped_lora_grad", a, (x.shape[1], len(widths) * b.shape[0]), "a")
    if h is not None:
        _check("grouped_lora_grad", h, (x.shape[0], a.shape[1]), "h")
    if d_x_base is not None:
        _check("grouped_lora_grad", d_x_base, x.shape, "d_x_base")
    run = choose("grouped_lora_grad", IMPLEMENTATIONS, implementation)
    return run(x, d_y, a, b, scale, h, d_x_base, widths=widths)


def _check(operation, array, shape, name):
    if array.shape != shape:
        raise ValueError(f"{operation}: {name} has shape {array.shape}; the other arguments need {shape}")
