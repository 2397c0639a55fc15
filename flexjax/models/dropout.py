"""Dropout of what an adapter reads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flexjax.models.lora import MODULES, ROW_PARALLEL
from flexjax.models.sharding import TP_AXIS


@dataclass(frozen=True)
class Dropout:
    """LoRA input dropout that can be repeated: the mask is a hash of (seed of the slot, layer, module, column).

    Attributes:
        seeds: [T] uint32, different for every (job, step, sequence, position).
        rate: [T] float32, 0 for slots without dropout.
        layer: scalar int32.
        tp: shards; above 1 this runs inside `jax.shard_map`.
    """

    seeds: jax.Array
    rate: jax.Array
    layer: jax.Array
    tp: int = 1

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        salt = jnp.uint32(MODULES.index(name)) + jnp.uint32(len(MODULES)) * self.layer.astype(jnp.uint32)
        columns = mix(self.columns(name, x.shape[-1]) + mix(salt) * jnp.uint32(0x9E3779B9))
        bits = mix(mix(self.seeds)[:, None] ^ columns)
        uniform = (bits >> 8).astype(jnp.float32) * (1.0 / (1 << 24))
        kept = uniform >= self.rate[:, None]
        return jnp.where(kept, x / (1 - self.rate[:, None]).astype(x.dtype), 0)

    def columns(self, name: str, width: int) -> jax.Array:
        """Numbers in the whole model of the columns that this shard sees, [width] uint32."""
        sharded = self.tp > 1 and name in ROW_PARALLEL
        first = jax.lax.axis_index(TP_AXIS).astype(jnp.uint32) * jnp.uint32(width) if sharded else jnp.uint32(0)
        return first + jnp.arange(width, dtype=jnp.uint32)


def mix(bits: jax.Array) -> jax.Array:
    """A bijective 32-bit mixing function (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
