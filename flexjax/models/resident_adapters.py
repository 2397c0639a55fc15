"""ResidentAdapters: the addition of many adapters at once, as a forward step makes it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.models.dropout import Dropout
from flexjax.models.layers import product as matrix_product
from flexjax.models.lora import PRODUCTS, modules_of
from pallas_kernels import gated_expand, lora_expand


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
        kept: [tiles, 2] int32, of every 64 slots whether gate and whether up is wanted beside their product; None: of
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

    def onto(self, product: str, x: jax.Array, y: jax.Array, residual: jax.Array) -> jax.Array:
        """The residual plus the output of the product's one module, by the operation that adds to that."""
        options = dict(widths=residual.shape[1:], plan=self.plan[product], implementation=self.implementation)
        return lora_expand(*self.operands(product, x, y), residual=residual, **options)

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
