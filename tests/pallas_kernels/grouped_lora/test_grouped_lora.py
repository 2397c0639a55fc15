"""The grouped low-rank product against one small product per slot in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_lora, grouped_lora_grad
from pallas_kernels.grouped_lora.cases import SMALL, SMALL_GRAD


def float64(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


def oracle(x, a, b, indices, owner, scale):
    """Every slot through the columns of its own adapter, taken out of the flat rank axis."""
    x, a, b, scale = float64(x, a, b, scale)
    y = np.zeros((x.shape[0], b.shape[1]))
    for slot, adapter in enumerate(indices):
        columns = [8 * unit + i for unit in range(len(owner)) for i in range(8) if adapter and owner[unit] == adapter]
        y[slot] = scale[adapter] * (x[slot] @ a[:, columns]) @ b[columns]
    return y


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_one_product_per_slot(case):
    arguments = case.make(seed=1)
    y = jax.jit(grouped_lora)(**arguments)
    assert y.dtype == case.dtype
    # bfloat16 rounds the up to 16 values of x a (each to 2**-9 of a value near 1 to 4) and the result.
    tolerance = {"rtol": 2.0**-7, "atol": 2.0**-6} if case.dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(y, np.float64), oracle(**arguments), **tolerance)


def test_slots_without_an_adapter_are_exactly_zero():
    arguments = SMALL[0].make(seed=2)
    y = np.asarray(grouped_lora(**arguments))
    assert not y[arguments["indices"] == 0].any()
    assert all(row.any() for row in y[arguments["indices"] != 0])


def test_neighbours_do_not_matter():
    arguments = SMALL[1].make(seed=3)
    alone = grouped_lora(**arguments | {"indices": np.where(np.arange(68) == 10, 1, 0).astype(np.int32)})
    np.testing.assert_array_equal(grouped_lora(**arguments)[10], alone[10])


def test_no_product_is_computed_without_adapters():
    arguments = SMALL[3].make(seed=0)
    program = jax.make_jaxpr(lambda kw: grouped_lora(**kw))(arguments)
    (branch,) = [equation for equation in program.eqns if equation.primitive.name == "cond"]
    products = lambda jaxpr: str(jaxpr).count("dot_general[")
    without, with_adapters = (products(jaxpr) for jaxpr in branch.params["branches"])
    assert (without, with_adapters) == (0, 2)
    assert products(program) == 2  # none stands outside the branches


def test_indices_and_owners_are_data():
    arguments = SMALL[0].make(seed=4)
    traces = []

    @jax.jit
    def product(arguments):
        traces.append(1)
        return grouped_lora(**arguments)

    for owner in ((2, 1, 1, 0, 3), (1, 1, 0, 0, 2), (3, 3, 3, 3, 3)):
        changed = arguments | {"owner": np.array(owner, np.int32)}
        np.testing.assert_allclose(
            np.asarray(product(changed), np.float64), oracle(**changed), rtol=2.0**-7, atol=2.0**-5
        )
    assert len(traces) == 1


@pytest.mark.parametrize("case", SMALL_GRAD, ids=lambda case: case.name)
def test_gradients_equal_their_closed_form(case):
    arguments = case.make(seed=1)
    d_a, d_b, d_x = jax.jit(grouped_lora_grad)(**arguments)
    x, d_y, a, b = float64(*(arguments[name] for name in ("x", "d_y", "a", "b")))
    scale = float(arguments["scale"])
    assert (d_a.dtype, d_b.dtype, d_x.dtype) == (jnp.float32, jnp.float32, case.dtype)
    # bfloat16 rounds x a and d_y b' to 2**-9 of values near 5, and up to 64 such terms are summed.
    tolerance = {"rtol": 2.0**-7, "atol": 0.2} if case.dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(d_a, scale * x.T @ (d_y @ b.T), **tolerance)
    np.testing.assert_allclose(d_b, scale * (x @ a).T @ d_y, **tolerance)
    np.testing.assert_allclose(np.asarray(d_x, np.float64), scale * d_y @ b.T @ a.T, **tolerance)


def test_gradients_are_those_of_the_forward_product():
    forward = SMALL[1].make(seed=5)
    x, a, b, scale = (forward[name] for name in ("x", "a", "b", "scale"))
    indices = np.ones(len(x), np.int32)
    product = lambda x, a, b: grouped_lora(x, a, b, indices, forward["owner"], scale)
    y, pull_back = jax.vjp(product, x, a, b)
    d_y = jax.random.normal(jax.random.key(0), y.shape)
    d_x, d_a, d_b = pull_back(d_y)
    for got, want in zip(grouped_lora_grad(x, d_y, a, b, scale[1]), (d_a, d_b, d_x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # float32, sums of up to 172 terms


def test_slots_without_a_cotangent_contribute_nothing():
    arguments = SMALL_GRAD[1].make(seed=6)
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
        ({"a": np.zeros((16, 8), np.float32)}, r"a has shape \(16, 8\); the other arguments need \(16, 24\)"),
        ({"b": np.zeros((8, 8), np.float32)}, r"b has shape \(8, 8\); the other arguments need \(24, 8\)"),
        ({"indices": np.zeros(3, np.int32)}, r"indices has shape \(3,\); the other arguments need \(4,\)"),
        ({"implementation": "fast"}, "grouped_lora: no implementation 'fast'; it has reference"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_lora(**SMALL[2].make(seed=0) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": np.zeros((16, 16), np.float32)}, r"a has shape \(16, 16\); the other arguments need \(16, 8\)"),
        ({"d_y": np.zeros((1, 9), np.float32)}, r"d_y has shape \(1, 9\); the other arguments need \(1, 8\)"),
        ({"implementation": "fast"}, "grouped_lora_grad: no implementation 'fast'; it has reference"),
    ],
)
def test_gradient_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_lora_grad(**SMALL_GRAD[2].make(seed=0) | change)
