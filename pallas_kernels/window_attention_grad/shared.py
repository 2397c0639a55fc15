"""Shared memory and barriers of a CTA of the window's attention gradient, and the numbers that shape them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.window_attention_grad.work import TILE

COMPUTE = 2
"""Warpgroups that compute, one for each key block of the CTA. The one after them loads."""

STAGES = 2
"""Tiles of Q and dO. Of 227 KiB (head size 128) K and V take 64, these 64, dS 48 and parts of sums 32."""

PARTS = 3
"""Tiles of dS. A warpgroup writes one while the other may still multiply the last but one."""

COLUMNS = 64
"""Columns of dQ that a warpgroup makes: half a row of head size 128, from the dS of both key blocks; a whole row of
head size 64, from its own key block."""


@dataclass(frozen=True)
class Heads:
    """Static numbers of the call; group: query heads of a K/V head; interpreted: runs in the interpreter."""

    group: int
    kv_heads: int
    head_size: int
    scale: float
    interpreted: bool


@dataclass(frozen=True)
class Shared:
    """Attributes:
    k, v: [2 key blocks, 64, D].
    q, d_out: [STAGES, 64, D]. lse, delta: [STAGES, 64] float32.
    d_scores: [PARTS, 2 key blocks, 64 keys, 64 queries].
    sums: [COMPUTE, 64, COLUMNS] float32, on the way to global memory.
    keys_loaded, q_loaded (with lse), d_out_loaded (with delta): filled by the TMA engine.
    used: a stage has been read by both computing warpgroups. d_scores_stored: a part has been written by both.
    operand: [COMPUTE, 64, 64], in the interpreter only.
    """

    k: jax.Ref
    v: jax.Ref
    q: jax.Ref
    d_out: jax.Ref
    lse: jax.Ref
    delta: jax.Ref
    d_scores: jax.Ref
    sums: jax.Ref
    keys_loaded: jax.Ref
    q_loaded: jax.Ref
    d_out_loaded: jax.Ref
    used: jax.Ref
    d_scores_stored: jax.Ref
    operand: jax.Ref | None = None


def allocations(heads: Heads, dtype) -> dict:
    """What ``Shared`` is made of, by name, for ``pl.run_scoped``."""
    barriers = lambda arrivals, number: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    return {
        **{name: plgpu.SMEM((2, TILE, heads.head_size), dtype) for name in ("k", "v")},
        **{name: plgpu.SMEM((STAGES, TILE, heads.head_size), dtype) for name in ("q", "d_out")},
        **{name: plgpu.SMEM((STAGES, TILE), jnp.float32) for name in ("lse", "delta")},
        "d_scores": plgpu.SMEM((PARTS, 2, TILE, TILE), dtype),
        "sums": plgpu.SMEM((COMPUTE, TILE, COLUMNS), jnp.float32),
        "keys_loaded": plgpu.Barrier(num_arrivals=4),
        **{name: barriers(2, STAGES) for name in ("q_loaded", "d_out_loaded")},
        "used": barriers(COMPUTE, STAGES),
        "d_scores_stored": barriers(COMPUTE, PARTS),
        **({"operand": plgpu.SMEM((COMPUTE, TILE, TILE), dtype)} if heads.interpreted else {}),
    }
