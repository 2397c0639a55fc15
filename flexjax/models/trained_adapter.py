"""TrainedAdapter: the addition of the adapter being trained, and its gradients."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flexjax.layout import RANK_UNIT
from flexjax.models.dropout import Dropout
from flexjax.models.lora import PRODUCTS, modules_of
from pallas_kernels import grouped_lora_grad, lora_expand


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

    def onto(self, product: str, x: jax.Array, y: jax.Array, residual: jax.Array) -> jax.Array:
        return residual + self(product, x, y, residual.shape[1:])[0]


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
