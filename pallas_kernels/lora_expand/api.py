"""``lora_expand`` as callers use it: arguments checked, implementation named, and the plan of a step."""

import functools
from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.lora_expand import kernel, reference
from pallas_kernels.lora_expand.plan import RANK_UNIT, plan_slots
from pallas_kernels.mosaic import INTERPRETER


def _reference(*arrays, plan, **options):
    """The reference needs no plan."""
    return reference.lora_expand(*arrays, **options)


IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": _reference,
        "mosaic_gpu": kernel.lora_expand,
        "mosaic_gpu_interpreted": functools.partial(kernel.lora_expand, interpret=INTERPRETER),
    }
)

PLANS = MappingProxyType({"reference": lambda *_: None, "mosaic_gpu": plan_slots, "mosaic_gpu_interpreted": plan_slots})
"""Of every implementation, what computes its plan."""


def plan_lora_expand(indices, owner, scale, *, implementation: str = "reference"):
    """What ``lora_expand`` can know before it sees a layer; computed once a step, used by all layers and products.

    Args:
        indices, owner, scale: as for ``lora_expand``.

    Returns:
        A pytree of arrays to pass as ``plan``; None where there is nothing to plan.

    Raises:
        ValueError: an unknown implementation.
    """
    return choose("plan_lora_expand", PLANS, implementation)(indices, owner, scale)


def lora_expand(
    y, low, b, layer, indices, owner, scale, *, widths, residual=None, plan=None, implementation: str = "reference"
):
    """Adds to a frozen product what every slot's own adapter contributes, from its low-rank activations.

    The frozen product may be that of several modules that share their input, side by side. Module j has columns
    ``j * R`` to ``(j + 1) * R`` of low, and the next ``widths[j]`` columns of y and b:

        y[t, columns of j] += (scale[indices[t]] * low[t, jR : (j + 1)R], own columns only) b[layer, :, columns of j]

    The adapters lie side by side on the flat rank axis in units of 8 columns, each owning any number of units:

        owner  = [2, 1, 1, 0]         adapter 2 has rank 8, adapter 1 rank 16, the last unit is free
        columns   0-7 | 8-15  16-23 | 24-31

    Args:
        y: [slots, out], the frozen product. Updated in place where it is not used again. With no ``low``, [slots, out +
            modules * R]: low lies behind the product, as when A lies behind the frozen weights.
        low: [slots, modules * R], float32 or y's dtype, x A of every module. May be anything where it is not a slot's
            own. None where it lies behind y.
        b: [layers, R, out], of all adapters and layers; finite throughout, in free units too.
        layer: int32 scalar, may be traced.
        indices: [slots] int32, adapter of each slot; 0 for none.
        owner: [R / 8] int32, adapter that owns each unit of 8 columns; 0 for nobody.
        scale: [adapters] float32; entry 0 is not read.
        widths: columns of each module; static, their sum is ``out``.
        residual: [slots, out] in y's dtype, added to what y has become; None: nothing is.
        plan: from ``plan_lora_expand``; None computes it here.

    Returns:
        y with the contributions; what lies behind them stays as it was. The scaled low is rounded to the dtype of y;
        sums are in float32 and rounded once. Slots without an adapter keep their bits. With a ``residual``, an array of
        its own, [slots, out]: the residual plus that y, rounded again, of every slot.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, or shapes and dtypes that it does not
            take (the kernel: y and b of one 16-bit dtype, widths that are multiples of 64, R up to 1024).
    """
    slots, out, rank = y.shape[0], sum(widths), owner.shape[0] * RANK_UNIT
    if low is None:
        _check(y, (slots, out + len(widths) * rank), "y with low behind it")
    elif y.shape[1] != out:
        raise ValueError(f"lora_expand: widths {tuple(widths)} add up to {out}; y has {y.shape[1]} columns")
    else:
        _check(low, (slots, len(widths) * rank), "low")
    _check(b, (b.shape[0], rank, out), "b")
    _check(indices, (slots,), "indices")
    if residual is not None:
        _check(residual, (slots, out), "residual")
    run = choose("lora_expand", IMPLEMENTATIONS, implementation)
    return run(y, low, b, layer, indices, owner, scale, widths=tuple(widths), residual=residual, plan=plan)


def _check(array, shape, name):
    if array.shape != shape:
        raise ValueError(f"lora_expand: {name} has shape {array.shape}; the other arguments need {shape}")
