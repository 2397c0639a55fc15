"""The trained adapter: gradients against those of the formula, roundings against the served one, absent modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models.dropout import Dropout
from flexjax.models.lora import no_adapter
from flexjax.models.resident_adapters import ResidentAdapters
from flexjax.models.trained_adapter import TrainedAdapter
from pallas_kernels import grouped_lora_grad

TOKENS = 512


def test_gradients_of_the_trained_adapter():
    random = np.random.default_rng(0)
    x, a, b, d_y = (jnp.float32(random.standard_normal(shape)) for shape in ((20, 6), (6, 8), (8, 10), (20, 10)))
    y = jnp.float32(random.standard_normal((20, 10)))
    adapter = lambda a, b: TrainedAdapter({"o_proj": a}, {"o_proj": b}, jnp.float32(0.7), "reference")
    got_y, got = jax.vjp(lambda x, a, b, y: adapter(a, b)("o", x, y, (10,))[0], x, a, b, y)
    expected_y, expected = jax.vjp(lambda x, a, b, y: y + 0.7 * (x @ a) @ b, x, a, b, y)
    np.testing.assert_allclose(got_y, expected_y, atol=1e-5)
    for g, e in zip(got(d_y), expected(d_y), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-4)


@pytest.mark.parametrize("rate, calls", [(None, [(10, 6)]), (0.0, [(10,), (6,)])], ids=["no dropout", "dropout"])
def test_gradients_of_modules_that_share_their_input(rate, calls, monkeypatch):
    """Of q, k and v, k is not adapted. One call has the widths of all modules that read the same values."""
    seen = []

    def grad(*arrays, widths, **options):
        seen.append(widths)
        return grouped_lora_grad(*arrays, widths=widths, **options)

    monkeypatch.setattr("flexjax.models.trained_adapter.grouped_lora_grad", grad)
    random = np.random.default_rng(1)
    shapes = dict(x=(TOKENS, 7), y=(TOKENS, 20), d_y=(TOKENS, 20), a_q=(7, 8), b_q=(8, 10), a_v=(7, 8), b_v=(8, 6))
    v = {name: jnp.float32(random.standard_normal(shape)) for name, shape in shapes.items()}
    d_y, seeds = v.pop("d_y"), jnp.arange(TOKENS, dtype=jnp.uint32)
    masks = None if rate is None else Dropout(seeds, jnp.full(TOKENS, rate, jnp.float32), jnp.int32(0))

    def adapted(x, y, a_q, b_q, a_v, b_v):
        factors = {"q_proj": a_q, "v_proj": a_v}, {"q_proj": b_q, "v_proj": b_v}
        adapter = TrainedAdapter(*factors, jnp.float32(0.7), "reference", masks)
        return jnp.concatenate(adapter("qkv", x, y, (10, 4, 6)), axis=1)

    def expected(x, y, a_q, b_q, a_v, b_v):
        added = jnp.concatenate([x @ a_q @ b_q, jnp.zeros((TOKENS, 4)), x @ a_v @ b_v], axis=1)
        return y + 0.7 * added

    with jax.default_matmul_precision("highest"):
        (got_y, got), (want_y, want) = (jax.vjp(function, *v.values()) for function in (adapted, expected))
        np.testing.assert_allclose(got_y, want_y, atol=1e-4)
        for g, w in zip(got(d_y), want(d_y), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-6 * np.abs(w).max(), rtol=1e-4)
    assert seen == calls or seen == calls[::-1]


def test_the_trained_adapter_rounds_as_the_served_one():
    """To the bit in bfloat16: a backward unit recomputes what the forward step saw. Of gate and up, only up is adapted;
    the served stack holds a second layer and another adapter."""
    random = np.random.default_rng(0)
    shapes = (20, 64), (64, 8), (8, 48), (20, 96)
    x, a, b, y = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    x, y, widths = jnp.bfloat16(x), jnp.bfloat16(y), (48, 48)
    trained = TrainedAdapter({"up_proj": a}, {"up_proj": b}, jnp.float32(0.7), "reference")("gate_up", x, y, widths)
    other = random.standard_normal((64, 8))
    served_a = np.concatenate([other, np.zeros((64, 8)), other, a], axis=1)  # two modules of two units each
    y = jnp.concatenate([y, x @ jnp.bfloat16(served_a)], axis=1)  # as the product with A behind the frozen matrix does
    served_b = random.standard_normal((2, 16, 96))
    served_b[1, 8:] = np.concatenate([np.zeros((8, 48)), b], axis=1)
    served = ResidentAdapters(
        *({"gate_up": jnp.bfloat16(served_b)}, jnp.int32(1)),
        *(jnp.ones(20, jnp.int32), {"gate_up": jnp.int32([2, 1])}, jnp.float32([0, 0.7, 3.0]), "reference"),
        plan={"gate_up": None},
    )("gate_up", x, y, widths)
    for one, two in zip(trained, served, strict=True):
        assert one.dtype == two.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one.astype(jnp.float32), two.astype(jnp.float32))


def test_onto_a_residual_the_trained_adapter_rounds_as_the_served_one():
    """To the bit in bfloat16: mid, which a backward unit makes again; also of slots that no adapter serves."""
    random = np.random.default_rng(1)
    x, a, b, y, residual = (
        random.standard_normal(shape).astype(np.float32) for shape in [(20, 64), (64, 8), (8, 48), (20, 48), (20, 48)]
    )
    x, y, residual = jnp.bfloat16(x), jnp.bfloat16(y), jnp.bfloat16(residual)
    trained = TrainedAdapter({"o_proj": a}, {"o_proj": b}, jnp.float32(0.7), "reference")
    indices = jnp.ones(20, jnp.int32).at[:5].set(0)
    served = ResidentAdapters(
        *({"o": jnp.bfloat16(b)[None]}, jnp.int32(0), indices, {"o": jnp.int32([1])}, jnp.float32([0, 0.7])),
        *("reference", {"o": None}),
    )
    joined = jnp.concatenate([y, x @ jnp.bfloat16(a)], axis=1)
    got, plain = served.onto("o", x, joined, residual), no_adapter.onto("o", x, y, residual)
    expected = jnp.where(indices[:, None] > 0, trained.onto("o", x, y, residual), plain)
    assert got.dtype == plain.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))
    np.testing.assert_array_equal(plain.astype(jnp.float32), (residual + y).astype(jnp.float32))
    assert np.abs((got - plain).astype(jnp.float32))[5:].max() > 1


def test_a_module_left_out_of_the_product():
    """Its output has no columns; the other's is what the whole product gives, to the bit."""
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.float32(random.standard_normal(shape))
    x, y, names = jnp.bfloat16(draw(20, 64)), jnp.bfloat16(draw(20, 80)), ("gate_proj", "up_proj")
    a, b = {name: draw(64, 8) for name in names}, {name: draw(8, 40) for name in names}
    adapter = TrainedAdapter(a, b, jnp.float32(0.7), "reference")
    whole = adapter("gate_up", x, y, (40, 40))
    for place, widths in enumerate([(40, 0), (0, 40)]):
        parts = adapter("gate_up", x, y[:, 40 * place : 40 * (place + 1)], widths)
        assert tuple(part.shape[1] for part in parts) == widths
        np.testing.assert_array_equal(parts[place].astype(jnp.float32), whole[place].astype(jnp.float32))


def test_absent_modules_add_nothing():
    x, y = jnp.ones((3, 6)), jnp.arange(24.0).reshape(3, 8)
    a, b = jnp.ones((6, 8)), jnp.ones((8, 2))
    trained = TrainedAdapter({"k_proj": a}, {"k_proj": b}, jnp.float32(1), "reference")
    np.testing.assert_array_equal(trained("o", x, y, (8,))[0], y)
    np.testing.assert_array_equal(no_adapter("o", x, y, (8,))[0], y)
    np.testing.assert_array_equal(jnp.concatenate(trained("qkv", x, y, (4, 2, 2)), -1), y.at[:, 4:6].add(48))
