"""Memory of the expansion kernel: what it reads and writes, and what a thread block keeps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora_expand.plan import TILE
from pallas_kernels.lora_expand.tiling import PART


@dataclass(frozen=True)
class Inputs:
    """Arrays in global memory: of ``api.lora_expand``, and of ``plan.Plan``. ``low`` is y itself where it lies behind
    y: nobody writes those columns. ``result`` is y too where there is no ``residual``."""

    y: jax.Ref
    residual: jax.Ref | None
    result: jax.Ref
    low: jax.Ref
    b: jax.Ref
    layer: jax.Ref
    slots: jax.Ref
    scale: jax.Ref
    pieces: jax.Ref
    owner: jax.Ref


@dataclass(frozen=True)
class Shared:
    """Shared memory and barriers of a thread block. First axis: pieces of b and owner, stages of y and residual, ring
    of low."""

    b: jax.Ref
    owner: jax.Ref
    y: jax.Ref
    slots: jax.Ref
    scale: jax.Ref
    low: jax.Ref
    b_loaded: jax.Ref
    b_read: jax.Ref
    y_loaded: jax.Ref
    y_stored: jax.Ref
    low_loaded: jax.Ref
    low_read: jax.Ref
    residual: jax.Ref | None = None


def shared_memory(shape, dtype, low_dtype):
    """What the fields of ``Shared`` are made of."""
    stages, ring = shape.tiling.stages, shape.tiling.ring
    barriers = lambda number, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    y, copies = in_rows((stages, shape.parts, TILE, PART), dtype), 2 if shape.residual else 1
    for_product = plgpu.TilingTransform((8, shape.piece)), plgpu.SwizzleTransform(2 * shape.piece)
    return {
        "b": plgpu.SMEM((shape.pieces, shape.piece, shape.tiling.columns), dtype, transforms=for_product),
        "owner": plgpu.SMEM((shape.pieces, shape.piece), jnp.int32),
        "y": y,
        "slots": plgpu.SMEM((stages, TILE), jnp.int32),
        "scale": plgpu.SMEM((stages, TILE), jnp.float32),
        "low": in_rows((ring, TILE, shape.piece), low_dtype),
        "b_loaded": barriers(1, shape.pieces + 1),
        "b_read": barriers(1),
        "y_loaded": barriers(stages, copies * shape.parts + 2),
        "y_stored": barriers(stages),
        "low_loaded": barriers(ring),
        "low_read": barriers(ring),
        **({"residual": y} if shape.residual else {}),
    }


def in_rows(shape, dtype):
    """Rows of at most 128 bytes in the bank order of tiles of 8 rows, but not in such tiles: their copies could only
    start at every eighth slot."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(shape[-1] * jnp.dtype(dtype).itemsize),))
