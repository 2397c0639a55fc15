"""``grouped_lora`` and ``grouped_lora_grad`` as callers use them: arguments checked, implementation named."""

from types import MappingProxyType

from pallas_kernels.grouped_lora import reference
from pallas_kernels.implementations import choose

IMPLEMENTATIONS = MappingProxyType({"reference": reference.grouped_lora})
GRAD_IMPLEMENTATIONS = MappingProxyType({"reference": reference.grouped_lora_grad})

RANK_UNIT = 8
"""Columns of the flat rank axis that one entry of ``owner`` speaks for."""


def grouped_lora(x, a, b, indices, owner, scale, *, implementation: str = "reference"):
    """The low-rank update of every slot by its own adapter: ``scale * (x a) b`` over the columns its adapter owns.

    The adapters lie side by side on a flat rank axis in units of 8 columns, each owning any number of units:

        owner  = [2, 1, 1, 0]         adapter 2 has rank 8, adapter 1 rank 16, the last unit is free
        columns   0-7 | 8-15  16-23 | 24-31

    Args:
        x: [slots, in].
        a: [in, rank], b: [rank, out]; all adapters. Both must be finite throughout, in free units too: columns that
            are not a slot's own are multiplied by zero.
        indices: [slots] int32, adapter of each slot; 0 for none.
        owner: [rank / 8] int32, adapter that owns each unit of 8 columns; 0 for nobody.
        scale: [adapters] float32; entry 0 is not read.

    Returns:
        [slots, out] in the dtype of x; sums in float32, the scaled ``x a`` rounded to the dtype of x. Slots without an
        adapter get exactly 0, and no product is computed when there is no other.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
    """
    rank = owner.shape[0] * RANK_UNIT
    _check("grouped_lora", a, (x.shape[1], rank), "a")
    _check("grouped_lora", b, (rank, b.shape[-1]), "b")
    _check("grouped_lora", indices, x.shape[:1], "indices")
    return choose("grouped_lora", IMPLEMENTATIONS, implementation)(x, a, b, indices, owner, scale)


def grouped_lora_grad(x, d_y, a, b, scale, *, implementation: str = "reference"):
    """Gradients of ``y = scale * (x a) b`` of one adapter.

    Args:
        x: [slots, in], d_y: [slots, out]; slots whose d_y is 0 contribute nothing (their x must be finite).
        a: [in, rank], b: [rank, out] of the adapter.
        scale: float32 scalar, may be traced.

    Returns:
        d_a: [in, rank] float32, d_b: [rank, out] float32, d_x: like x. Sums in float32; ``x a`` and the cotangent of it
        are rounded to the dtype of x, as the forward pass rounds the former.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
    """
    _check("grouped_lora_grad", a, (x.shape[1], b.shape[0]), "a")
    _check("grouped_lora_grad", d_y, (x.shape[0], b.shape[1]), "d_y")
    return choose("grouped_lora_grad", GRAD_IMPLEMENTATIONS, implementation)(x, d_y, a, b, scale)


def _check(operation, array, shape, name):
    if array.shape != shape:
        raise ValueError(f"{operation}: {name} has shape {array.shape}; the other arguments need {shape}")
