"""The update step at an accumulation boundary: gradients into the float32 master, the master into a serving slot.

    (master, gradients, adapter stack, hyperparameters) -> (master, gradients, adapter stack, gradient norm)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from flexjax.models.lora import PRODUCTS, ROW_PARALLEL, module_widths
from flexjax.models.matrices import row_shards, rows_behind
from flexjax.state import AdapterStack, Dimensions, Gradients, Master, summed_over_shards

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "rmsprop")


@dataclass(frozen=True)
class OptimizerSpec:
    """The static part of an optimizer; the learning rate is data.

    Attributes:
        max_grad_norm: global norm to clip to; None does not clip.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def transform(self) -> optax.GradientTransformation:
        """The optax chain with a learning rate of one: all of these are linear in it."""
        builders = {
            "adamw": lambda: optax.adamw(1.0, weight_decay=self.weight_decay),
            "adam": lambda: optax.adam(1.0),
            "sgd": lambda: optax.sgd(1.0),
            "lion": lambda: optax.lion(1.0, weight_decay=self.weight_decay),
            "adafactor": lambda: optax.adafactor(1.0, multiply_by_parameter_scale=False),
            "rmsprop": lambda: optax.rmsprop(1.0),
        }
        if self.name not in builders:
            raise ValueError(f"optimizer is {self.name!r}; it must be one of {', '.join(OPTIMIZERS)}")
        return builders[self.name]()


def update(
    spec: OptimizerSpec,
    dims: Dimensions,
    master: Master,
    gradients: Gradients,
    stack: AdapterStack,
    learning_rate: jax.Array,
    first_column: jax.Array,
    ratios: dict[str, jax.Array],
) -> tuple[Master, Gradients, AdapterStack, jax.Array]:
    """Clip, step, publish.

    Args:
        first_column: where the new version's range of the flat rank axis begins, int32.
        ratios: module -> [layers, 1, 1] float32, what is folded into each B so that one scale serves all terms; the
            optimizer sees B and its gradient without it, as PEFT keeps them.

    A step that would leave a value that is not finite is not taken: one NaN in the stack would reach every adapter
    that is served beside it.

    Returns:
        The new master, zeroed gradient sums, the stack with the version published, and the global gradient norm
        before clipping (float32), NaN if the step was not taken.
    """
    grads = {"a": whole(gradients.a, "a"), "b": scaled(whole(gradients.b, "b"), ratios)}
    norm = optax.tree.norm(grads)
    before = {"a": master.a, "b": master.b}, master.optimizer
    after = stepped(spec, master, grads, norm, learning_rate, ratios)
    served = jax.tree.map(lambda p: p.astype(next(iter(stack.a.values())).dtype), after[0])
    finite = jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(served)]).all() & jnp.isfinite(norm)
    factors, optimizer = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    empty = {"a": jax.tree.map(jnp.zeros_like, gradients.a), "b": jax.tree.map(jnp.zeros_like, gradients.b)}
    gradients = Gradients(**empty, hidden=gradients.hidden, d_k=gradients.d_k, d_v=gradients.d_v)
    master = Master(**factors, optimizer=optimizer)
    return master, gradients, publish(dims, stack, factors, first_column), jnp.where(finite, norm, jnp.nan)


def stepped(spec: OptimizerSpec, master: Master, grads: dict, norm, learning_rate, ratios) -> tuple[dict, object]:
    """The factors and the optimizer's state after a step along clipped gradients."""
    if spec.max_grad_norm is not None:
        # torch.nn.utils.clip_grad_norm_, epsilon included
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, spec.max_grad_norm / (norm + 1e-6)), grads)
    params = {"a": master.a, "b": {name: b / ratios[name] for name, b in master.b.items()}}
    steps, optimizer = spec.transform().update(grads, master.optimizer, params)
    params = jax.tree.map(lambda p, s: p + learning_rate * s, params, steps)
    return {"a": params["a"], "b": scaled(params["b"], ratios)}, optimizer


def whole(sums: dict[str, jax.Array], factor: str) -> dict[str, jax.Array]:
    return {name: g.sum(axis=0) if summed_over_shards(name, factor) else g for name, g in sums.items()}


def scaled(factors: dict[str, jax.Array], ratios: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: factor * ratios[name] for name, factor in factors.items()}


def publish(dims: Dimensions, stack: AdapterStack, params: dict[str, dict], first_column: jax.Array) -> AdapterStack:
    """Write an adapter {"a": module -> [layers, in, r], "b": module -> [layers, r, out]} into its range of the flat
    rank axis; modules it does not have become zero there."""
    a = {product: place_a(dims, whole, params["a"], product, first_column) for product, whole in stack.a.items()}
    place = lambda product, whole: place_b(dims, whole, params["b"], PRODUCTS[product], first_column)
    b = {product: place(product, whole) for product, whole in stack.b.items()}
    return AdapterStack(a, b)


def place_a(dims: Dimensions, whole: jax.Array, factors: dict, product: str, first_column: jax.Array) -> jax.Array:
    """Into the rows behind the frozen ones, of every shard that has rows of its own."""
    layers, _, width = whole.shape
    shards, rank = row_shards(product, dims.tp), rank_of(factors)
    view, empty = whole.reshape(layers, shards, -1, width), jnp.zeros((layers, width, rank))
    first = view.shape[2] - rows_behind(product, dims.rank_capacity) + first_column
    for number, name in enumerate(PRODUCTS[product]):
        factor = factors.get(name, empty).astype(whole.dtype).swapaxes(1, 2)
        factor = jnp.broadcast_to(factor[:, None], (layers, shards, rank, width))
        view = jax.lax.dynamic_update_slice(view, factor, (0, 0, first + number * dims.rank_capacity, 0))
    return view.reshape(whole.shape)


def place_b(dims: Dimensions, whole: jax.Array, factors: dict, modules: tuple[str, ...], first_column) -> jax.Array:
    """Into [layers, R, out], whose columns are grouped by shard where shards divide them."""
    layers, rank, _ = whole.shape
    shards = 1 if modules[0] in ROW_PARALLEL else dims.tp
    view, column, widths = whole.reshape(layers, rank, shards, -1), 0, module_widths(dims.model)
    for name in modules:
        shape = (layers, rank_of(factors, axis=1), shards, widths[name][1] // shards)
        factor = factors[name].reshape(shape) if name in factors else jnp.zeros(shape)
        view = jax.lax.dynamic_update_slice(view, factor.astype(whole.dtype), (0, first_column, 0, column))
        column += shape[-1]
    return view.reshape(whole.shape)


def rank_of(factors: dict[str, jax.Array], axis: int = 2) -> int:
    return next(iter(factors.values())).shape[axis]


def new_master(spec: OptimizerSpec, factors: dict[str, dict]) -> Master:
    return Master(factors["a"], factors["b"], spec.transform().init(factors))
