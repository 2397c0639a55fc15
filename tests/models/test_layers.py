"""Normalisation and rotary embedding against formulas in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models.config import Llama3RopeScaling
from flexjax.models.layers import rms_norm, rotary_frequencies, rotate, rotation_of
from tests.dense_model import frequencies
from tests.ladder import LLAMA


def test_rms_norm():
    x, scale = np.random.default_rng(0).standard_normal((5, 16)), np.linspace(0.5, 2, 16)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale), 1e-5), expected, rtol=1e-5)


def test_rms_norm_of_bfloat16_sums_in_float32():
    """Squares of 1000 summed over 4096 columns: in bfloat16 the sum would stop growing at a 256th of its value."""
    x = jnp.full((1, 4096), 1000, jnp.bfloat16)
    got = rms_norm(x, jnp.ones(4096, jnp.bfloat16), 1e-5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), 1.0)


def test_rotation_turns_pairs_by_position_times_frequency():
    """Pair j is (x[j], x[j + D/2]), a complex number multiplied by exp(i position frequency)."""
    x, positions = np.random.default_rng(0).standard_normal((4, 3, 8)), np.array([0, 1, 17, 300])
    turning = np.array([1.0, 0.3, 0.05, 0.001])
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None] * turning)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    got = rotate(jnp.float32(x), rotation_of(jnp.asarray(positions), jnp.float32(turning)))
    np.testing.assert_allclose(got, expected, atol=2e-5)


SHORT, LONG = Llama3RopeScaling(8.0, 1.0, 4.0, 64), Llama3RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("scaling", [None, SHORT, LONG], ids=["plain", "short", "long"])
def test_frequencies(scaling):
    """With a head of 128 and a context of 64 or 8192 some wavelengths are kept, some stretched, some between."""
    config = dataclasses.replace(LLAMA, head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    expected = frequencies(config)
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=2e-5)
    if scaling is not None:
        plain = frequencies(dataclasses.replace(config, rope_scaling=None))
        ratios = plain / expected
        assert ratios[0] == 1 and ratios[-1] == pytest.approx(scaling.factor)
        assert ((ratios > 1.001) & (ratios < 0.999 * scaling.factor)).any()
