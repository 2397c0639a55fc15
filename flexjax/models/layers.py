"""The small parts of a decoder layer: RMS normalisation, products, activation, rotary position embedding. No weights
live here."""

import jax
import jax.numpy as jnp

from flexjax.models.config import Llama3RopeScaling, ModelConfig


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation in float32 (Zhang and Sennrich 2019). x [..., d], scale [d] -> x's dtype."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [T, in] times a matrix as files store it, [out, in] -> [T, out]. Its leading rows lie in one piece, so that a
    product with some of them reads them where they are."""
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020), in their dtype."""
    return jax.nn.silu(gate) * up


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """Angular frequency of every rotated pair, [head_dim / 2] float32, with the Llama 3 scaling where configured."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    return frequencies if scaling is None else scale_frequencies(frequencies, scaling)


def scale_frequencies(frequencies: jax.Array, scaling: Llama3RopeScaling) -> jax.Array:
    """Llama 3.1's context extension: long wavelengths are divided by the factor, short ones kept, between blended
    (`_compute_llama3_parameters` of transformers)."""
    wavelengths = 2 * jnp.pi / frequencies
    context = scaling.original_max_position_embeddings
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = jnp.clip((context / wavelengths - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of the angle by which each pair of each slot turns, both [T, head_dim / 2] float32."""


def rotation_of(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    """positions [T], frequencies [D / 2]; the same for every layer."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotary position embedding, rotate-half layout. x [T, heads, D] -> x's dtype."""
    cos, sin = (each[:, None, :] for each in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
