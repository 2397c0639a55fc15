"""A program that fails on the device, after it was given an argument for good."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fail_on_the_device(given: int) -> Callable:
    """A program that takes the argument of this number along and then fails while it runs."""

    def fail(_):
        raise MemoryError("no room for that")

    def body(*arguments):
        nothing = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(0))
        return jax.tree.map(lambda array: array + nothing.astype(array.dtype), arguments[given])

    return jax.jit(body, donate_argnums=given)
