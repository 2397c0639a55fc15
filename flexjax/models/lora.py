"""LoRA: the one addition beside a frozen product, for many resident adapters at once or for the one being trained.

An adapter is called with what a frozen product made, ``adapter(product, x, y, widths)``. A product may serve several
modules that share their input: their outputs lie side by side in ``y``, and the adapter returns them apart, each with
its own contribution. One of a forward step also has ``gated``, which goes on to what gate and up are made for.
"""

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.models.config import ModelConfig
from flexjax.models.layers import product as matrix_product
from flexjax.models.layers import swiglu
from flexjax.models.sharding import TP_AXIS
from pallas_kernels import gated_expand, grouped_lora_grad, lora_expand

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


def products_of(modules: Collection[str]) -> tuple[int, ...]:
    """Positions of the products that these modules are columns of."""
    return tuple(i for i, names in enumerate(PRODUCTS.values()) if not set(names).isdisjoint(modules))


class NoAdapter:
    """The adapter of a plain base-model pass."""

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        return modules_of(y, widths)

    def gated(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Gate and up, side by side in y, -> (silu(gate) * up, y)."""
        return swiglu(*self(product, x, y, widths)), y


no_adapter = NoAdapter()


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
        b: product -> [layers, R, out], every layer's, the modules' columns side by side; R is the flat rank axis that
            all adapters share.
        layer: scalar int32.
        indices: [T] int32, adapter index per slot (0 none).
        owner: product -> [R / 8] int32, adapter index that owns each unit of the rank axis there (0 nobody).
        scale: [adapters] float32.
        plan: product -> of `plan_lora_expand`, the same for every layer.
        dropout: applied to the input of slots that ask for it. Without it, x A of every module lies behind y, made by
            the product itself.
        a: with dropout, product -> [modules * R, in], this layer's, one module after another.
        gated_implementation: as ``implementation``, of ``gated``.
        kept: [tiles, 2] bool, of every 64 slots whether gate and whether up is wanted beside their product; None: of
            none.
    """

    b: dict[str, jax.Array]
    layer: jax.Array
    indices: jax.Array
    owner: dict[str, jax.Array]
    scale: jax.Array
    implementation: str
    plan: dict[str, Any]
    dropout: Dropout | None = None
    a: dict[str, jax.Array] | None = None
    gated_implementation: str = "reference"
    kept: jax.Array | None = None

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        options = dict(widths=widths, plan=self.plan[product], implementation=self.implementation)
        return modules_of(lora_expand(*self.operands(product, x, y), **options)[:, : sum(widths)], widths)

    def gated(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Gate and up, side by side in y, -> (silu(gate) * up, with what is added to each, and y in place). In y lies
        what of gate and up with that is ``kept``; all else there is for no one."""
        options = dict(plan=self.plan[product], implementation=self.gated_implementation)
        return gated_expand(*self.operands(product, x, y), self.kept, **options)

    def operands(self, product: str, x: jax.Array, y: jax.Array) -> tuple:
        """What an expansion multiplies and adds: without dropout, x A of every module lies behind y."""
        low = None if self.dropout is None else self.low(product, x)
        return y, low, self.b[product], self.layer, self.indices, self.owner[product], self.scale

    def low(self, product: str, x: jax.Array) -> jax.Array:
        """x A of every module, side by side, [T, modules * R]; dropout differs from module to module."""
        modules = PRODUCTS[product]
        parts = zip(modules, jnp.split(self.a[product], len(modules)), strict=True)
        return jnp.concatenate([matrix_product(self.dropout(name, x), a) for name, a in parts], axis=-1)


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
        """Modules of a product read the same x: one operation for those that are adapted. Dropout hides other values of
        x from each, so that they are operations of their own."""
        parts = dict(zip(PRODUCTS[product], modules_of(y, widths), strict=True))
        own = [name for name in parts if name in self.a]
        if self.dropout is None:
            return list((parts | self.added(own, x, parts)).values())
        for name in own:
            parts |= self.added([name], self.dropout(name, x), parts)
        return list(parts.values())

    def added(self, names: list[str], x: jax.Array, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """These modules' outputs with the adapter's part."""
        of_names = lambda values: tuple(values[name] for name in names)
        factors = of_names(self.a), of_names(self.b)
        ys = low_rank_added(self.implementation, x, of_names(parts), *factors, self.scale) if names else ()
        return dict(zip(names, ys, strict=True))


Each = tuple[jax.Array, ...]
"""One array for each module."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank_added(implementation: str, x: jax.Array, ys: Each, a: Each, b: Each, scale: jax.Array) -> Each:
    """Adds (x A) scale B of every module to its y, rounded once.

    Rounds where `lora_expand` rounds, so that a backward pass recomputes what the forward pass saw.

    Args:
        x: [T, in], which the modules share; ys: [T, out] each, with an out of its own.
        a: [in, r] float32, b: [r, out] float32.
        scale: float32 scalar.
    """
    return _low_rank_forward(implementation, x, ys, a, b, scale)[0]


def _low_rank_forward(implementation, x, ys, a, b, scale):
    low = lambda a: (jnp.dot(x, a.astype(x.dtype)).astype(jnp.float32) * scale).astype(x.dtype)
    h = tuple(map(low, a))
    return tuple(map(_plus_product, ys, h, b)), (x, h, a, b, scale)


def _plus_product(y, h, b):
    delta = jnp.dot(h, b.astype(h.dtype), preferred_element_type=jnp.float32)
    delta = jax.lax.optimization_barrier(delta)  # else a GPU's product adds onto y in float32: twice the bytes to move
    return (y.astype(jnp.float32) + delta).astype(y.dtype)


def _low_rank_backward(implementation, residuals, d_ys):
    """One call, on cotangents side by side: the frozen product's gradient reads them so as well, and one array is made
    for both."""
    x, h, a, b, scale = residuals
    widths, factors = tuple(d_y.shape[1] for d_y in d_ys), [beside(each).astype(x.dtype) for each in (a, b)]
    d_y = beside(d_ys).astype(x.dtype)
    options = dict(widths=widths, h=beside(h), implementation=implementation)
    d_a, d_b, d_x = grouped_lora_grad(x, d_y, *factors, scale, **options)
    return d_x, d_ys, tuple(jnp.split(d_a, len(a), axis=-1)), tuple(modules_of(d_b, widths)), jnp.zeros_like(scale)


low_rank_added.defvjp(_low_rank_forward, _low_rank_backward)


def beside(arrays: Each) -> jax.Array:
    return jnp.concatenate(arrays, axis=-1)
