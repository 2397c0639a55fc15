"""Dropout against its statistics."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models.dropout import Dropout

TOKENS, WIDTH = 512, 256


def dropout(rate: float, layer: int = 0, first_seed: int = 0) -> Dropout:
    seeds = jnp.arange(first_seed, first_seed + TOKENS, dtype=jnp.uint32)
    return Dropout(seeds, jnp.full(TOKENS, rate, jnp.float32), jnp.int32(layer))


def kept(drop: Dropout, name: str = "q_proj") -> np.ndarray:
    return np.asarray(drop(name, jnp.ones((TOKENS, WIDTH)))) != 0


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate):
    """Of 131072 draws; four standard deviations. Rows and columns each follow the rate too."""
    mask = kept(dropout(rate))
    deviation = (rate * (1 - rate)) ** 0.5
    assert mask.mean() == pytest.approx(1 - rate, abs=4 * deviation / mask.size**0.5)
    for axis, count in ((0, TOKENS), (1, WIDTH)):
        assert np.abs(mask.mean(axis=axis) - (1 - rate)).max() < 6 * deviation / count**0.5
    values = np.unique(dropout(rate)("q_proj", jnp.ones((TOKENS, WIDTH))))
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)


def test_masks_differ_by_layer_module_and_token():
    """No two masks agree more often than chance: half of the time at a rate of one half."""
    masks = [kept(dropout(0.5)), kept(dropout(0.5, layer=1)), kept(dropout(0.5), "down_proj")]
    masks.append(kept(dropout(0.5, first_seed=TOKENS)))
    masks += [np.roll(masks[0], 1, axis=0), np.roll(masks[0], 1, axis=1)]
    for one, other in itertools.combinations(masks, 2):
        assert (one == other).mean() == pytest.approx(0.5, abs=0.01)


def test_masks_repeat_and_follow_the_seed_not_the_place():
    np.testing.assert_array_equal(kept(dropout(0.5)), kept(dropout(0.5)))
    np.testing.assert_array_equal(kept(dropout(0.5))[100:], kept(dropout(0.5, first_seed=100))[:-100])


def test_slots_without_dropout_are_untouched():
    rate = jnp.where(jnp.arange(TOKENS) < 8, 0.0, 0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, WIDTH)), jnp.float32)
    got = Dropout(jnp.arange(TOKENS, dtype=jnp.uint32), rate, jnp.int32(0))("q_proj", x)
    np.testing.assert_array_equal(got[:8], x[:8])
