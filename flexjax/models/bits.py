"""Bits: bfloat16 arrays as integers, on their way through interfaces that have no name for bfloat16."""

import jax
import jax.numpy as jnp


def bits_dtype(dtype) -> jnp.dtype:
    """The type that carries values of ``dtype``: uint16 for bfloat16, itself for all others."""
    return jnp.dtype(jnp.uint16 if jnp.dtype(dtype) == jnp.bfloat16 else dtype)


def from_bits(array: jax.Array, dtype) -> jax.Array:
    """Values of ``dtype`` from an array of ``bits_dtype(dtype)``; costs nothing."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def to_bits(array: jax.Array) -> jax.Array:
    """Inverse of `from_bits`."""
    bits = bits_dtype(array.dtype)
    return array if array.dtype == bits else jax.lax.bitcast_convert_type(array, bits)
