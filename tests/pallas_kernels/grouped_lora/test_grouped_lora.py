"""Gradients of an adapter against their closed form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_lora_grad, lora_expand
from pallas_kernels.grouped_lora.cases import SMALL


def float64(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


def oracle_grad(x, d_y, a, b, scale, widths=None, h=None, d_x_base=None):
    """Closed form in float64, module by module, with every intermediate value unrounded."""
    x, d_y, a, b = float64(x, d_y, a, b)
    d_a, d_b, d_x = np.zeros_like(a), np.zeros_like(b), 0 if d_x_base is None else float64(d_x_base)[0]
    start, rank = 0, b.shape[0]
    for module, width in enumerate(widths or b.shape[1:]):
        out, low = slice(start, start + width), slice(module * rank, (module + 1) * rank)
        d_h = float(scale) * d_y[:, out] @ b[:, out].T
        d_a[:, low], d_b[:, out] = x.T @ d_h, float(scale) * (x @ a[:, low]).T @ d_y[:, out]
        d_x = d_x + d_h @ a[:, low].T
        start += width
    return d_a, d_b, d_x


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradients_equal_their_closed_form(case):
    arguments = case.make(seed=1)
    d_a, d_b, d_x = jax.jit(grouped_lora_grad, static_argnames="widths")(**arguments)
    assert (d_a.dtype, d_b.dtype, d_x.dtype) == (jnp.float32, jnp.float32, case.dtype)
    # bfloat16 rounds x a and d_y b' to 2**-9 of values near 5, and up to 64 such terms are summed.
    tolerance = {"rtol": 2.0**-7, "atol": 0.2} if case.dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    for got, want in zip((d_a, d_b, d_x), oracle_grad(**arguments), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, **tolerance)


def test_gradients_are_those_of_the_forward_product():
    random = np.random.default_rng(5)
    x, a, b, y = (np.float32(random.standard_normal(shape)) for shape in ((68, 24), (24, 8), (8, 40), (68, 40)))
    expand = lambda y, low, b: lora_expand(
        *(y, low, b[None], 0, np.ones(68, np.int32), np.ones(1, np.int32), np.float32([0, 1.5])), widths=(40,)
    )
    _, pull_back = jax.vjp(lambda x, a, b: expand(y, x @ a, b), x, a, b)
    d_y = jax.random.normal(jax.random.key(0), y.shape)
    d_x, d_a, d_b = pull_back(d_y)
    for got, want in zip(grouped_lora_grad(x, d_y, a, b, np.float32(1.5)), (d_a, d_b, d_x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # float32, sums of up to 68 terms


def test_slots_without_a_cotangent_contribute_nothing():
    arguments = SMALL[1].make(seed=6)
    arguments["d_y"][64:] = 0
    d_a, d_b, d_x = grouped_lora_grad(**arguments)
    half = arguments | {"x": arguments["x"][:64], "d_y": arguments["d_y"][:64]}
    expected = grouped_lora_grad(**half)
    np.testing.assert_allclose(d_a, expected[0], rtol=1e-5, atol=1e-5)  # sums in another order
    np.testing.assert_allclose(d_b, expected[1], rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(d_x[64:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((16, 16), np.float32)}, r"a has shape \(16, 16\); the other arguments need \(16, 8\)"),
        ({"d_y": np.zeros((1, 9), np.float32)}, r"d_y has shape \(1, 9\); the other arguments need \(1, 8\)"),
        ({"implementation": "fast"}, "grouped_lora_grad: no implementation 'fast'; it has mosaic_gpu, .*, reference"),
    ],
)
def test_gradient_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_lora_grad(**SMALL[2].make(seed=0) | change)
