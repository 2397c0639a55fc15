"""LoRA: the one addition beside a frozen product, for many resident adapters at once or for the one being trained.

An adapter is called with what a frozen product made, ``adapter(product, x, y, widths)``. A product may serve several
modules that share their input: their outputs lie side by side in ``y``, and the adapter returns them apart, each with
its own contribution. One of a forward step also has ``gated``, which goes on to what gate and up are made for.
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.layout import RANK_UNIT
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
        implementation: of `grouped_lora_grad`; expansion: of `lora_expand`.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: jax.Array
    implementation: str
    dropout: Dropout | None = None
    expansion: str = "reference"

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        """A module of no columns has been left out of y. Those that are adapted read the same x, unless dropout hides
        other values of it from each, so that their gradients are operations of their own."""
        columns = tuple(zip(PRODUCTS[product], widths, strict=True))
        own = tuple(name for name, width in columns if width and name in self.a)
        if not own:
            return modules_of(y, widths)
        xs = {own: x} if self.dropout is None else {(name,): self.dropout(name, x) for name in own}
        factors = ({name: factor[name] for name in own} for factor in (self.a, self.b))
        addition = Addition(columns, self.implementation, self.expansion)
        return list(low_rank_added(addition, xs, y, *factors, self.scale))


@dataclass(frozen=True)
class Addition:
    """What is known of an addition before its arrays are.

    Attributes:
        columns: (module, width) of all that lie side by side in y, adapted or not.
        implementation, expansion: as of `TrainedAdapter`.
    """

    columns: tuple[tuple[str, int], ...]
    implementation: str
    expansion: str

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for _, width in self.columns)

    def expanded(self, y: jax.Array, h: dict[str, jax.Array], b: dict[str, jax.Array]) -> jax.Array:
        """y plus h B of every module, in place; h [T, r] is scaled and rounded. One adapter, which all slots use."""
        present, (rank,) = [column for column in self.columns if column[1]], {len(each) for each in b.values()}
        padding = (0, -rank % RANK_UNIT)  # to whole units
        h = {name: jnp.pad(each, ((0, 0), padding)) for name, each in h.items()}
        b = {name: jnp.pad(each.astype(y.dtype), (padding, (0, 0))) for name, each in b.items()}
        rank += padding[1]
        nothing, ones = functools.partial(jnp.zeros, dtype=y.dtype), functools.partial(jnp.ones, dtype=jnp.int32)
        return lora_expand(
            *(y, beside([h.get(name, nothing((len(y), rank))) for name, _ in present])),
            beside([b.get(name, nothing((rank, width))) for name, width in present])[None],
            *(jnp.int32(0), ones(len(y)), ones(rank // RANK_UNIT), jnp.ones(2)),
            widths=tuple(width for _, width in present),
            implementation=self.expansion,
        )


Readers = tuple[str, ...]
"""The modules that read an input."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank_added(
    addition: Addition,
    xs: dict[Readers, jax.Array],
    y: jax.Array,
    a: dict[str, jax.Array],
    b: dict[str, jax.Array],
    scale: jax.Array,
) -> tuple[jax.Array, ...]:
    """The modules' outputs: y and in its columns of each, (x A) scale B. By the operation and with the roundings of a
    forward step, so that a backward pass recomputes what the forward pass saw.

    Args:
        xs: [T, in] each; y: [T, out], the modules side by side.
        a: module -> [in, r] float32, b: module -> [r, its width] float32.
        scale: float32 scalar.
    """
    return _low_rank_forward(addition, xs, y, a, b, scale)[0]


def _low_rank_forward(addition, xs, y, a, b, scale):
    low = lambda x, a: (jnp.dot(x, a.astype(x.dtype)).astype(jnp.float32) * scale).astype(x.dtype)
    h = {names: low(x, beside([a[name] for name in names])) for names, x in xs.items()}
    by_module = {name: part for names, each in h.items() for name, part in parts_of(each, names)}
    ys = modules_of(addition.expanded(y, by_module, b), addition.widths)
    return tuple(ys), (xs, h, a, b, scale)


def _low_rank_backward(addition, residuals, d_ys):
    """One call for modules that share an input, on cotangents side by side: the frozen product's gradient reads them so
    as well, and one array is made for both."""
    xs, h, a, b, scale = residuals
    parts = {name: d_y for (name, _), d_y in zip(addition.columns, d_ys, strict=True)}
    d_xs, d_a, d_b = {}, {}, {}
    for own, x in xs.items():
        d_own, *factors = (beside([each[name] for name in own]).astype(x.dtype) for each in (parts, a, b))
        options = dict(widths=tuple(parts[name].shape[1] for name in own), h=h[own])
        d_a_own, d_b_own, d_xs[own] = grouped_lora_grad(
            x, d_own, *factors, scale, **options, implementation=addition.implementation
        )
        d_a |= parts_of(d_a_own, own)
        d_b |= zip(own, modules_of(d_b_own, options["widths"]), strict=True)
    return d_xs, beside(d_ys), d_a, d_b, jnp.zeros_like(scale)


low_rank_added.defvjp(_low_rank_forward, _low_rank_backward)


def parts_of(array: jax.Array, names: Readers) -> list[tuple[str, jax.Array]]:
    """The modules' parts, of one width, of an array that holds them side by side."""
    return list(zip(names, jnp.split(array, len(names), axis=-1), strict=True))


def beside(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(arrays, axis=-1)
