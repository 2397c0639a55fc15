"""What the Mosaic GPU kernels share: names of layouts, and a tensor-core product that the interpreter can run too.

Every operation offers its kernel twice: "mosaic_gpu" runs on a Hopper GPU, "mosaic_gpu_interpreted" runs the same code
on a CPU, where warpgroups are threads, buffers start as NaN and unordered accesses are reported as races.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA
"""How a warpgroup holds a tile that its tensor-core product makes."""

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""One value for each row of such a tile."""

PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""One value for each column of such a tile."""

INTERPRETER = plgpu.InterpretGPUParams(detect_races=True)


@plgpu.inline_mgpu()
def fence(_):
    """What this thread wrote to memory is there for all that it signals next, and it sees what those wrote that
    signalled it: the barrier of a cluster alone does that for shared memory only."""
    mgpu.utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)


def whole(*arrays):
    """The arrays, hidden from the compiler's sight: operands of a kernel that also writes in place.

    XLA (of jax 0.11.2) fuses slices of whole rows into the call of a kernel that reads them, and that fusion forgets
    that other operands are results: they would never be written. Such slices are not always seen in the source; a
    product of 4 rows is one, since the compiler pads it to 8.
    """
    return lax.optimization_barrier(arrays)


def product(accumulator, a, b, *, interpreted: bool):
    """accumulator + a b in float32, waited for; an accumulator of None is zero.

    Args:
        accumulator: [m, n] float32 registers in layout WGMMA, or None.
        a: [m, k] shared memory, or registers in layout WGMMA; b: [k, n] shared memory. 16-bit both.
    """
    if interpreted:
        return _interpreted_product(accumulator, a, b)
    if accumulator is None:

        def from_zero(sums):
            plgpu.wgmma(sums, a, b)
            return sums[...]

        return pl.run_scoped(from_zero, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(accumulator))


AT_ONCE = 96
"""Values of unfinished products that a thread has room for beside what else it holds."""


def products(terms, *, interpreted: bool):
    """The ``product`` of each (accumulator, a, b), under way at the same time if registers have room for all."""
    if interpreted or sum(a.shape[0] * b.shape[1] for _, a, b in terms) >= 128 * AT_ONCE:
        return [product(*term, interpreted=interpreted) for term in terms]

    def issue(sums):
        for into, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(into, a, b)

    zeros = lambda a, b: plgpu.layout_cast(jnp.zeros((a.shape[0], b.shape[1]), jnp.float32), WGMMA)
    start = [zeros(a, b) if accumulator is None else accumulator for accumulator, a, b in terms]
    return pl.run_state(issue)([plgpu.ACC.init(value) for value in start])


def _interpreted_product(accumulator, a, b):
    """The interpreter has neither register operands nor initial values of accumulators: load and multiply."""
    loaded = lambda operand: operand if isinstance(operand, jax.Array) else operand[...]
    result = jnp.dot(loaded(a), loaded(b), preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # ordinary reads need the fence that the tensor core's own reads do not
    return result if accumulator is None else accumulator + result
