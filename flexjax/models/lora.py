"""LoRA: what adapters may add to, and how one is called. The adapters themselves have files of their own.

An adapter is called with what a frozen product made, ``adapter(product, x, y, widths)``. A product may serve several
modules that share their input: their outputs lie side by side in ``y``, and the adapter returns them apart, each with
its own contribution. ``onto(product, x, y, residual)`` adds the output of a product of one module to a residual. An
adapter of a forward step also has ``gated``, which goes on to what gate and up are made for.
"""

import itertools
from collections.abc import Collection
from types import MappingProxyType

import jax
import jax.numpy as jnp

from flexjax.models.config import ModelConfig
from flexjax.models.layers import swiglu

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

    def onto(self, product: str, x: jax.Array, y: jax.Array, residual: jax.Array) -> jax.Array:
        return residual + y

    def gated(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Gate and up, side by side in y, -> (silu(gate) * up, y)."""
        return swiglu(*self(product, x, y, widths)), y


no_adapter = NoAdapter()


def modules_of(y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
    """y [T, sum of widths] -> the modules' outputs."""
    return jnp.split(y, list(itertools.accumulate(widths[:-1])), axis=-1)
