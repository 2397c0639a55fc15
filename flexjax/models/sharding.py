"""Where shards talk: the collectives of tensor parallelism, with the gradients that a replicated value needs.

These run inside `jax.shard_map` over the axis ``tp``. Their derivatives are written out (the two conjugate operators of
Shoeybi et al. 2019, Megatron-LM), because the transpose of a plain ``psum`` would sum a cotangent that all shards hold.
"""

import jax

TP_AXIS = "tp"


@jax.custom_vjp
def enter_shards(x: jax.Array) -> jax.Array:
    """A replicated value on its way into column-parallel products: itself; its cotangent is summed over shards."""
    return x


enter_shards.defvjp(lambda x: (x, None), lambda _, d_x: (jax.lax.psum(d_x, TP_AXIS),))


@jax.custom_vjp
def leave_shards(y: jax.Array) -> jax.Array:
    """Partial results of a row-parallel product: their sum over shards; every shard gets the whole cotangent."""
    return jax.lax.psum(y, TP_AXIS)


leave_shards.defvjp(lambda y: (jax.lax.psum(y, TP_AXIS), None), lambda _, d_y: (d_y,))


def own_columns(value: jax.Array, tp: int) -> jax.Array:
    """This shard's share of the last axis of a replicated value."""
    width = value.shape[-1] // tp
    return jax.lax.dynamic_slice_in_dim(value, jax.lax.axis_index(TP_AXIS) * width, width, axis=-1)


def gathered_columns(value: jax.Array) -> jax.Array:
    """Inverse of `own_columns`."""
    return jax.lax.all_gather(value, TP_AXIS, axis=value.ndim - 1, tiled=True)
