"""Random values for cases, made on the host; large arrays cost a copy, not a draw per value."""

import jax.numpy as jnp
import numpy as np

PERIOD = 999_983
"""Values repeat after this many. A prime, so that rows, heads and pages never start at the same value."""


def normal(random: np.random.Generator, shape: tuple[int, ...], dtype: str, deviation: float = 1.0) -> np.ndarray:
    """Array of ``shape`` in ``dtype`` (bfloat16 too) with normal values of mean 0 and this standard deviation."""
    values = random.standard_normal(min(int(np.prod(shape)), PERIOD), np.float32) * np.float32(deviation)
    return np.resize(values.astype(jnp.dtype(dtype)), shape)
