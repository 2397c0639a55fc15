"""Resident adapters: gate and up with what adapters add, and the product that they go on to, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models.dropout import Dropout
from flexjax.models.resident_adapters import ResidentAdapters

TOKENS = 128


@pytest.mark.parametrize("rate", [None, 0.0], ids=["no dropout", "dropout"])
def test_gate_and_up_go_on_to_their_product(rate):
    """x A lies behind y, or is made beside it where dropout may be asked for. The second adapter owns the first unit
    of the rank axis, the first the other."""
    draw = lambda *shape: np.random.default_rng(sum(shape)).standard_normal(shape)
    x, y, a, b = draw(TOKENS, 24), draw(TOKENS, 80), draw(2 * 16, 24), draw(2, 16, 80)
    indices, owner, scale = np.arange(TOKENS) % 3, [2, 1], [0, 0.7, 3.0]
    masks = None if rate is None else Dropout(jnp.zeros(TOKENS, jnp.uint32), jnp.full(TOKENS, rate), jnp.int32(0))
    served = ResidentAdapters(
        *({"gate_up": jnp.float32(b)}, jnp.int32(1), jnp.int32(indices), {"gate_up": jnp.int32(owner)}),
        *(jnp.float32(scale), "reference"),
        **dict(plan={"gate_up": None}, dropout=masks, a=masks and {"gate_up": jnp.float32(a)}),
        kept=jnp.ones((TOKENS // 64, 2), bool),
    )
    joined = y if masks else np.concatenate([y, x @ a.T], axis=1)
    h, whole = served.gated("gate_up", jnp.float32(x), jnp.float32(joined), (40, 40))
    own = np.repeat(owner, 8) == indices[:, None]
    low = [np.where(own, x @ of_module.T, 0) * np.take(scale, indices)[:, None] for of_module in np.split(a, 2)]
    gate, up = (y[:, part] + each @ b[1, :, part] for part, each in zip((slice(40), slice(40, 80)), low, strict=True))
    np.testing.assert_allclose(whole[:, :80], np.concatenate([gate, up], axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(h, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-3)
