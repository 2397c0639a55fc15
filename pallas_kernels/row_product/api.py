"""``row_product`` as callers use it: arguments checked, implementation named."""

import functools
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.row_product import kernel, reference

IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": reference.row_product,
        "mosaic_gpu": kernel.row_product,
        "mosaic_gpu_interpreted": functools.partial(kernel.row_product, interpret=INTERPRETER),
    }
)


def row_product(x, weights, layer, *, residual=None, dtype=None, implementation: str = "reference"):
    """x weights[layer] + residual, for few rows: as fast as the weights can be read.

    The kernel reads the layer's weights where they lie in the stack. Pass the whole stack and the index, also inside a
    scan over layers: a slice would be copied first.

    Args:
        x: [rows, inputs].
        weights: [layers, inputs, outputs] in the dtype of x.
        layer: int32 scalar, may be traced.
        residual: [rows, outputs] in the dtype of x; None adds nothing.
        dtype: of the result; None is that of x.

    Returns:
        [rows, outputs]: sums in float32, rounded once. The same bits in every run.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown implementation, or shapes and dtypes that it
            does not take (the kernel: a 16-bit dtype, 1 to 64 rows, inputs that are a multiple of 64, outputs that are
            a multiple of 16).
    """
    if x.ndim != 2 or weights.ndim != 3 or x.shape[1] != weights.shape[1]:
        raise ValueError(f"row_product: x of shape {x.shape} does not fit weights of shape {weights.shape}")
    if x.dtype != weights.dtype:
        raise ValueError(f"row_product: x is {x.dtype}, the weights are {weights.dtype}; cast x")
    expected = (len(x), weights.shape[2])
    if residual is not None and (residual.shape != expected or residual.dtype != x.dtype):
        raise ValueError(
            f"row_product: the residual is {residual.dtype} of shape {residual.shape}, "
            f"the product {x.dtype} of shape {expected}"
        )
    return choose("row_product", IMPLEMENTATIONS, implementation)(x, weights, layer, residual, dtype=dtype)
