"""Random values for benchmarks, made where they are needed: gigabytes would take the host seconds."""

import math

import jax
import jax.numpy as jnp

from flexjax.bench.timing import compiled
from pallas_kernels.random_values import PERIOD


def device_normal(seed: int, shape: tuple[int, ...], dtype: str = "bfloat16", deviation: float = 1.0) -> jax.Array:
    """Normal values of mean 0, repeating after `PERIOD`."""
    return compiled(repeated_normal, shape=shape, dtype=dtype)(jax.random.key(seed), deviation)


def repeated_normal(key: jax.Array, deviation: float, *, shape: tuple[int, ...], dtype: str) -> jax.Array:
    size = math.prod(shape)
    block = (jax.random.normal(key, (min(size, PERIOD),)) * deviation).astype(dtype)
    return jnp.broadcast_to(block, (-(-size // len(block)), len(block))).reshape(-1)[:size].reshape(shape)
