"""ResidentAdapters: the addition of many adapters at once, as a forward step makes it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.models.dropout import Dropout
from flexjax.models.layers import product as matrix_product
from flexjax.models.lora import PRODUCTS, modules_of
from pallas_kernels import lora_expand


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

    def __call__(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> list[jax.Array]:
        return modules_of(self.whole(product, x, y, widths)[:, : sum(widths)], widths)

    def whole(self, product: str, x: jax.Array, y: jax.Array, widths: tuple[int, ...]) -> jax.Array:
        """y in place, the modules side by side; what lies behind them, [T, modules * R] or nothing, is for no one."""
        return lora_expand(
            *(y, None if self.dropout is None else self.low(product, x)),
            *(self.b[product], self.layer, self.indices, self.owner[product], self.scale),
            widths=widths,
            plan=self.plan[product],
            implementation=self.implementation,
        )

    def low(self, product: str, x: jax.Array) -> jax.Array:
        """x A of every module, side by side, [T, modules * R]; dropout differs from module to module."""
        modules = PRODUCTS[product]
        parts = zip(modules, jnp.split(self.a[product], len(modules)), strict=True)
        return jnp.concatenate([matrix_product(self.dropout(name, x), a) for name, a in parts], axis=-1)
