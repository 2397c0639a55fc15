"""LoRA: the one addition beside a frozen product, for many resident adapters at once or for the one being trained.

An adapter is called with what a frozen product made, ``adapter(product, x, y, widths)``. A product may serve several
modules that share their input: their outputs lie side by side in ``y``, and the adapter returns them apart, each with
its own contribution.
"""

import functools
import itertools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.models.config import ModelConfig
from flexjax.models.sharding import TP_AXIS
from pallas_kernels import grouped_lora_grad, lora_expand

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRODUCTS = MappingProxyType(
    {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
)
"""Modules of each frozen product, in the order of its columns."""

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
"""Modules whose input is sharded under tensor parallelism; the others have their output sharded."""


def module_widths(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(input width, output width) of every adaptable module, whole model (not per shard)."""
    d, ff = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outputs = dict(q_proj=(d, q), k_proj=(d, kv), v_proj=(d, kv), o_proj=(q, d))
    return {**outputs, "gate_proj": (d, ff), "up_proj": (d, ff), "down_proj": (ff, d)}


def no_adapter(product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """The adapter of a plain base-model pass."""
    return modules_of(y, widths)


def modules_of(y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """y [T, sum of widths] -> the modules' outputs."""
    return jnp.split(y, list(itertools.accumulate(widths[:-1])), axis=-1)


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


@dataclass(frozen=True)
class ResidentAdapters:
    """Every resident adapter in one layer; each slot of the token axis names the one it uses.

    Attributes:
        a: product -> [in, modules * R], this layer's, one module after another; R is the flat rank axis that all
            adapters share.
        b: product -> [layers, R, out], every layer's, the modules' columns side by side.
        layer: scalar int32.
        indices: [T] int32, adapter index per slot (0 none).
        owner: [R / 8] int32, adapter index that owns each unit of the rank axis (0 nobody).
        scale: [adapters] float32.
        plan: of `plan_lora_expand`, the same for every layer.
        dropout: applied to the input of slots that ask for it.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    layer: jax.Array
    indices: jax.Array
    owner: jax.Array
    scale: jax.Array
    implementation: str
    plan: Any = None
    dropout: Dropout | None = None

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        y = lora_expand(
            *(y, self.low(product, x), self.b[product], self.layer, self.indices, self.owner, self.scale),
            widths=widths,
            plan=self.plan,
            implementation=self.implementation,
        )
        return modules_of(y, widths)

    def low(self, product: str, x: jax.Array) -> jax.Array:
        """x A of every module, side by side, [T, modules * R] float32; dropout differs from module to module."""
        project = lambda x, a: jnp.dot(x, a, preferred_element_type=jnp.float32)
        if self.dropout is None:
            return project(x, self.a[product])
        modules = PRODUCTS[product]
        parts = zip(modules, jnp.split(self.a[product], len(modules), axis=-1), strict=True)
        return jnp.concatenate([project(self.dropout(name, x), a) for name, a in parts], axis=-1)


@dataclass(frozen=True)
class TrainedAdapter:
    """One layer of the adapter being trained; differentiable in ``a`` and ``b`` (float32 masters, cast to x's dtype).

    Attributes:
        a: module -> [in, r] float32; b: module -> [r, out] float32; absent modules are not adapted.
        scale: scalar float32.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: jax.Array
    implementation: str
    dropout: Dropout | None = None

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        parts = zip(PRODUCTS[product], modules_of(y, widths), strict=True)
        return [self.added(name, x, part) for name, part in parts]

    def added(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """One module's output with the adapter's part, rounded once."""
        if name not in self.a:
            return y
        x = x if self.dropout is None else self.dropout(name, x)
        delta = single_lora(self.implementation, x, self.a[name], self.b[name], self.scale)
        return (y.astype(jnp.float32) + delta).astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def single_lora(implementation: str, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """x [T, in], a [in, r], b [r, out] float32, scale scalar -> (x A) scale B, [T, out] float32.

    Rounds where `lora_expand` rounds, so that a backward pass recomputes what the forward pass saw.
    """
    h = jnp.dot(x, a.astype(x.dtype), preferred_element_type=jnp.float32) * scale
    return jnp.dot(h.astype(x.dtype), b.astype(x.dtype), preferred_element_type=jnp.float32)


def _single_lora_forward(implementation, x, a, b, scale):
    return single_lora(implementation, x, a, b, scale), (x, a, b, scale)


def _single_lora_backward(implementation, residuals, d_y):
    x, a, b, scale = residuals
    factors = a.astype(x.dtype), b.astype(x.dtype)
    d_a, d_b, d_x = grouped_lora_grad(x, d_y.astype(x.dtype), *factors, scale, implementation=implementation)
    return d_x, d_a, d_b, jnp.zeros_like(scale)


single_lora.defvjp(_single_lora_forward, _single_lora_backward)
