"""What adapters may add to: widths of the modules, the products that they are columns of; the pass without any."""

import jax.numpy as jnp
import numpy as np

from flexjax.models.lora import MODULES, module_widths, no_adapter, products_of
from tests.ladder import LLAMA


def test_widths_of_every_module():
    """LLAMA: hidden 48, feed-forward 72, 8 query and 4 key/value heads of 4."""
    assert module_widths(LLAMA) == {
        **dict(q_proj=(48, 32), k_proj=(48, 16), v_proj=(48, 16), o_proj=(32, 48)),
        **dict(gate_proj=(48, 72), up_proj=(48, 72), down_proj=(72, 48)),
    }
    assert tuple(module_widths(LLAMA)) == MODULES


def test_products_of_modules():
    assert products_of(("down_proj",)) == (3,)
    assert products_of(("up_proj", "v_proj", "q_proj")) == (0, 2)
    assert products_of(MODULES) == (0, 1, 2, 3)


def test_gate_and_up_without_an_adapter_go_on_to_their_product():
    y = np.random.default_rng(0).standard_normal((5, 80))
    h, whole = no_adapter.gated("gate_up", None, jnp.float32(y), (40, 40))
    gate, up = y[:, :40], y[:, 40:]
    np.testing.assert_allclose(h, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole, jnp.float32(y))
