"""``gated_expand`` as callers use it: arguments checked, implementation named."""

import functools
from types import MappingProxyType

from pallas_kernels.gated_expand import apart, kernel, reference
from pallas_kernels.implementations import choose
from pallas_kernels.lora_expand.plan import RANK_UNIT, TILE
from pallas_kernels.mosaic import INTERPRETER


def _reference(*arrays, plan):
    """The reference needs no plan."""
    return reference.gated_expand(*arrays)


IMPLEMENTATIONS = MappingProxyType(
    {
        "reference": _reference,
        "lora_expand": apart.gated_expand,
        "lora_expand_interpreted": functools.partial(apart.gated_expand, interpret=INTERPRETER),
        "mosaic_gpu": kernel.gated_expand,
        "mosaic_gpu_interpreted": functools.partial(kernel.gated_expand, interpret=INTERPRETER),
    }
)


def gated_expand(y, low, b, layer, indices, owner, scale, kept=None, *, plan=None, implementation: str = "reference"):
    """What every slot's own adapter adds to gate and up, and silu(gate) * up of all slots.

    As ``lora_expand`` of two modules of one width, gate before up, and then

        h[t] = silu(gate[t]) * up[t]        gate and up as ``lora_expand`` leaves them, rounded to y's dtype

    Every step of silu and the product with up is rounded to y's dtype, as the compiler does with 16-bit arrays: e =
    exp(-gate), 1 + e, 1 / (1 + e), gate times that, and that times up. So ``jax.nn.silu(gate) * up`` of gate and up
    that were kept is h again.

    "mosaic_gpu" does all in one pass over y; "lora_expand" is the Mosaic kernel of that operation, whose results the
    compiler then reads again for h. They take the same plan.

    Args:
        y: [slots, 2 * width], the frozen products gate and up side by side; with no ``low``, [slots, 2 * (width + R)].
        low, b, layer, indices, owner, scale: as for ``lora_expand``; b is [layers, R, 2 * width].
        kept: [tiles, 2] bool or int32, whether gate, and whether up, of these 64 slots is wanted too. Tiles end where
            the slots end, only the first may have fewer than 64. None: nothing is.
        plan: from ``plan_lora_expand``; None computes it here.

    Returns:
        (h [slots, width], y). What is kept lies in y in place, as ``lora_expand`` leaves it (but that a 0 of a slot
        without an adapter may have lost its sign), and what lies behind gate and up stays as it was; what of them is
        not kept is unspecified.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, or shapes and dtypes that it does not
            take (either kernel: y and b of one 16-bit dtype, a width that is a multiple of 64, R up to 1024).
    """
    slots, out, rank = y.shape[0], b.shape[2], owner.shape[0] * RANK_UNIT
    if out % 2:
        raise ValueError(f"gated_expand: b has {out} columns, which are not gate and up of one width")
    _check(y, (slots, out + (2 * rank if low is None else 0)), "y" if low is not None else "y with low behind it")
    if low is not None:
        _check(low, (slots, 2 * rank), "low")
    _check(b, (b.shape[0], rank, out), "b")
    _check(indices, (slots,), "indices")
    if kept is not None:
        _check(kept, (-(-slots // TILE), 2), "kept")
    run = choose("gated_expand", IMPLEMENTATIONS, implementation)
    return run(y, low, b, layer, indices, owner, scale, kept, plan=plan)


def _check(array, shape, name):
    if array.shape != shape:
        raise ValueError(f"gated_expand: {name} has shape {array.shape}; the other arguments need {shape}")
