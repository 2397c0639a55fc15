"""Memory of the gated expansion: what it reads and writes, and what a thread block keeps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora_expand.memory import in_rows
from pallas_kernels.lora_expand.plan import TILE


@dataclass(frozen=True)
class Arrays:
    """Arrays in global memory: of ``api.gated_expand``, and of ``lora_expand.plan.Plan``. ``low`` is y itself where it
    lies behind y; ``kept`` is None, and y is not written, where nothing is."""

    y: jax.Ref
    low: jax.Ref
    kept: jax.Ref | None
    b: jax.Ref
    layer: jax.Ref
    slots: jax.Ref
    scale: jax.Ref
    pieces: jax.Ref
    owner: jax.Ref
    h: jax.Ref


@dataclass(frozen=True)
class Shared:
    """Shared memory and barriers of a thread block. First axis: places of b and owner, stages of y, slots and scale,
    ring of low, workers of h. b and y lie by ``Shape.share``, low by module."""

    b: jax.Ref
    owner: jax.Ref
    y: jax.Ref
    slots: jax.Ref
    scale: jax.Ref
    low: jax.Ref
    h: jax.Ref
    b_loaded: jax.Ref
    b_read: jax.Ref
    y_loaded: jax.Ref
    y_read: jax.Ref
    low_loaded: jax.Ref
    low_read: jax.Ref


def shared_memory(shape, dtype, low_dtype):
    """What the fields of ``Shared`` are made of."""
    tiling, piece = shape.tiling, shape.piece
    stages, ring, places, workers = tiling.stages, tiling.ring, tiling.b_places, tiling.workers
    barriers = lambda number, arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    for_product = plgpu.TilingTransform((8, piece)), plgpu.SwizzleTransform(2 * piece)
    return {
        "b": plgpu.SMEM((places, shape.pieces, 2 * workers, piece, tiling.part), dtype, transforms=for_product),
        "owner": plgpu.SMEM((places, shape.pieces, piece), jnp.int32),
        "y": in_rows((stages, 2 * workers, TILE, tiling.part), dtype),
        "slots": plgpu.SMEM((stages, TILE), jnp.int32),
        "scale": plgpu.SMEM((stages, TILE), jnp.float32),
        "low": in_rows((ring, 2, TILE, piece), low_dtype),
        "h": in_rows((workers, TILE, tiling.part), dtype),
        "b_loaded": barriers(places, shape.pieces * 2 * workers + 1),
        "b_read": barriers(places, workers),
        "y_loaded": barriers(stages, 2 * workers + 2),
        "y_read": barriers(stages, workers),
        "low_loaded": barriers(ring, 2),
        "low_read": barriers(ring, workers),
    }
