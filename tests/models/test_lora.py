"""LoRA: gradients against `jax.grad` of the formula, dropout against its statistics, absent modules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.models.lora import (
    MODULES,
    Dropout,
    ResidentAdapters,
    TrainedAdapter,
    module_widths,
    no_adapter,
    products_of,
)
from pallas_kernels import grouped_lora_grad
from tests.ladder import LLAMA

TOKENS, WIDTH = 512, 256


def dropout(rate: float, layer: int = 0, first_seed: int = 0) -> Dropout:
    seeds = jnp.arange(first_seed, first_seed + TOKENS, dtype=jnp.uint32)
    return Dropout(seeds, jnp.full(TOKENS, rate, jnp.float32), jnp.int32(layer))


def kept(drop: Dropout, name: str = "q_proj") -> np.ndarray:
    return np.asarray(drop(name, jnp.ones((TOKENS, WIDTH)))) != 0


def test_widths_of_every_module():
    """LLAMA: hidden 48, feed-forward 72, 8 query and 4 key/value heads of 4."""
    assert module_widths(LLAMA) == {
        **dict(q_proj=(48, 32), k_proj=(48, 16), v_proj=(48, 16), o_proj=(32, 48)),
        **dict(gate_proj=(48, 72), up_proj=(48, 72), down_proj=(72, 48)),
    }
    assert tuple(module_widths(LLAMA)) == MODULES


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

    monkeypatch.setattr("flexjax.models.lora.grouped_lora_grad", grad)
    random = np.random.default_rng(1)
    shapes = dict(x=(TOKENS, 7), y=(TOKENS, 20), d_y=(TOKENS, 20), a_q=(7, 8), b_q=(8, 10), a_v=(7, 8), b_v=(8, 6))
    v = {name: jnp.float32(random.standard_normal(shape)) for name, shape in shapes.items()}
    d_y, masks = v.pop("d_y"), None if rate is None else dropout(rate)

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


@pytest.mark.parametrize("rate", [None, 0.0])
def test_gate_and_up_go_on_to_their_product(rate):
    """As the two modules apart do, in float32; x A lies behind y, or is made beside it where dropout may be asked for.
    A base-model pass adds nothing."""
    draw = lambda *shape: jnp.float32(np.random.default_rng(sum(shape)).standard_normal(shape))
    x, y, a, b, widths = draw(TOKENS, 24), draw(TOKENS, 80), draw(2 * 16, 24), draw(2, 16, 80), (40, 40)
    masks = None if rate is None else dropout(rate)
    adapters = jnp.arange(TOKENS) % 3, {"gate_up": jnp.int32([2, 1])}, jnp.float32([0, 0.7, 3.0]), "reference"
    served = ResidentAdapters(
        *({"gate_up": b}, jnp.int32(1), *adapters),
        **dict(plan={"gate_up": None}, dropout=masks, a=masks and {"gate_up": a}),
        kept=jnp.ones((TOKENS // 64, 2), bool),
    )
    joined = y if masks else jnp.concatenate([y, x @ a.T], axis=1)
    gate, up = np.float64(served("gate_up", x, joined, widths))
    h, whole = served.gated("gate_up", x, joined, widths)
    np.testing.assert_allclose(h, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(whole[:, :80], np.concatenate([gate, up], axis=1))
    h, whole = no_adapter.gated("gate_up", x, y, widths)
    np.testing.assert_allclose(h, y[:, :40] / (1 + np.exp(-np.float64(y[:, :40]))) * y[:, 40:], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole, y)


def test_products_of_modules():
    assert products_of(("down_proj",)) == (3,)
    assert products_of(("up_proj", "v_proj", "q_proj")) == (0, 2)
    assert products_of(MODULES) == (0, 1, 2, 3)


def test_absent_modules_add_nothing():
    x, y = jnp.ones((3, 6)), jnp.arange(24.0).reshape(3, 8)
    a, b = jnp.ones((6, 8)), jnp.ones((8, 2))
    trained = TrainedAdapter({"k_proj": a}, {"k_proj": b}, jnp.float32(1), "reference")
    np.testing.assert_array_equal(trained("o", x, y, (8,))[0], y)
    np.testing.assert_array_equal(no_adapter("o", x, y, (8,))[0], y)
    np.testing.assert_array_equal(jnp.concatenate(trained("qkv", x, y, (4, 2, 2)), -1), y.at[:, 4:6].add(48))
