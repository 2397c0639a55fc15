"""The row product, in the interpreter and on a GPU, against a product in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.model_shapes import LLAMA_3_1_8B
from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.row_product import kernel
from pallas_kernels.row_product.api import row_product
from pallas_kernels.row_product.cases import LARGE, SMALL, Case, low_rank, products
from pallas_kernels.row_product.tiling import MULTIPROCESSORS, SATURATING, STEP, Tiling, tiling_for

ON_BOTH = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
ON_ALL = pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)

run = jax.jit(row_product, static_argnames="implementation")


def exact(x, weights, layer, residual=None):
    """In float64."""
    y = np.asarray(x, np.float64) @ np.asarray(weights[layer], np.float64)
    return y if residual is None else y + np.asarray(residual, np.float64)


def assert_close(got, expected):
    """One rounding to bfloat16, relative 2**-9; float32 sums of products near 1 add far less."""
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2.0**-8, atol=1e-5)


@ON_ALL
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_a_product_in_float64(case, implementation, no_races):
    arguments = case.make(seed=1)
    y = run(**arguments, implementation=implementation)
    assert y.dtype == case.dtype
    assert_close(y, exact(**arguments))


TILINGS = (
    *(Tiling(32, 1, 2), Tiling(64, 3, 4), Tiling(96, 2, 3), Tiling(128, 7, 2)),
    *(Tiling(192, 2, 2, joined=True), Tiling(64, 4, 2, joined=True), Tiling(48, 2, 2, joined=True)),
)
"""Narrow and wide columns, whole and split inputs, more and fewer stages than steps; joined, of 24 rows the last block
adds up none."""


@pytest.mark.parametrize(
    "interpret", [INTERPRETER, pytest.param(None, marks=pytest.mark.gpu)], ids=["interpreted", "compiled"]
)
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling(tiling, interpret, no_races):
    arguments = Case("", 24, 448, 384, residual=tiling.columns == 64, layers=3).make(seed=2)
    product = functools.partial(kernel.row_product, tiling=tiling, interpret=interpret)
    assert_close(jax.jit(product)(**arguments), exact(**arguments))


@pytest.mark.parametrize(
    "interpret", [INTERPRETER, pytest.param(None, marks=pytest.mark.gpu)], ids=["interpreted", "compiled"]
)
@pytest.mark.parametrize("tiling", [Tiling(32, 1, 2), Tiling(32, 2, 2), Tiling(32, 2, 2, joined=True)], ids=str)
def test_a_result_in_float32(tiling, interpret, no_races):
    """Float32 sums of 256 products near 1/16."""
    arguments = Case("", 9, 256, 64).make(seed=6)
    product = functools.partial(kernel.row_product, dtype=jnp.float32, tiling=tiling, interpret=interpret)
    y = jax.jit(product)(**arguments)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact(**arguments), rtol=0, atol=1e-5)
    reference = row_product(**arguments, dtype=jnp.float32)
    np.testing.assert_allclose(reference, exact(**arguments), rtol=0, atol=1e-5)


@ON_BOTH
def test_rows_do_not_touch_each_other(implementation, no_races):
    """Nor does what is not finite in other layers reach the result."""
    arguments = Case("", 9, 128, 64, layers=3).make(seed=3) | {"layer": np.int32(1)}
    expected = exact(**arguments)
    arguments["x"][3:5] = np.nan
    arguments["weights"][[0, 2]] = np.nan
    others = np.arange(9)[[0, 1, 2, 5, 6, 7, 8]]
    assert_close(run(**arguments, implementation=implementation)[others], expected[others])


@ON_BOTH
def test_in_a_scan_over_layers(implementation, no_races):
    """Every layer's result is the next one's x and residual."""
    arguments = Case("", 8, 128, 128, layers=3).make(seed=4)
    weights, expected = arguments["weights"], np.asarray(arguments["x"], np.float64)

    def step(x, layer):
        return row_product(x, weights, layer, residual=x, implementation=implementation), None

    y, _ = jax.jit(lambda x: jax.lax.scan(step, x, np.arange(3, dtype=np.int32)))(arguments["x"])
    for layer in range(3):
        expected = np.asarray(jnp.asarray(exact(expected, weights, layer, expected), jnp.bfloat16), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-6, atol=2.0**-6)  # three roundings


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_real_shapes(case):
    """On a GPU alone: against float32 there, whose sums of up to 14,336 products are off by less than 1e-4."""
    arguments = jax.tree.map(jnp.asarray, case.make(seed=5))
    y = run(**arguments, implementation="mosaic_gpu")
    x, weights = arguments["x"].astype(jnp.float32), arguments["weights"][-1].astype(jnp.float32)
    expected = jnp.dot(x, weights, precision="highest")
    if case.residual:
        expected = expected + arguments["residual"].astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2.0**-8, atol=2e-4)
    np.testing.assert_array_equal(y, run(**arguments, implementation="mosaic_gpu"))


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_tilings_of_real_shapes(case):
    """Several steps in flight, and every split has some."""
    tiling = tiling_for(case.rows, case.inputs, case.outputs)
    assert case.outputs % tiling.columns == 0 and tiling.columns <= 256
    assert tiling.stages >= 3
    assert case.inputs // STEP >= 2 * tiling.splits or case.inputs < 1024


def test_thin_products_join_where_they_may():
    """Every block of the cluster has 8 rows to add up, one tile of shared memory."""
    for case in low_rank(LLAMA_3_1_8B, 64, 128):
        tiling = tiling_for(case.rows, case.inputs, case.outputs, may_join=True)
        assert (tiling.joined, tiling.splits) == (True, 8)
        assert not tiling_for(case.rows, case.inputs, case.outputs).joined
    assert not tiling_for(8, 4096, 6144, may_join=True).joined


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_thread_blocks_of_llama_run_at_once_and_saturate_the_memory(rows):
    for case in products(LLAMA_3_1_8B, rows):
        tiling = tiling_for(rows, case.inputs, case.outputs)
        assert SATURATING <= case.outputs // tiling.columns * tiling.splits <= MULTIPROCESSORS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((4, 64), jnp.bfloat16)}, r"x of shape \(4, 64\) does not fit weights of shape \(2, 128, 64\)"),
        ({"x": jnp.zeros((4, 128))}, "x is float32, the weights are bfloat16; cast x"),
        ({"residual": jnp.zeros((4, 64))}, r"residual is float32 .* product bfloat16 of shape \(4, 64\)"),
        ({"implementation": "fast"}, "row_product: no implementation 'fast'; it has mosaic_gpu"),
        ({"x": jnp.zeros((65, 128), jnp.bfloat16)}, "takes 1 to 64 rows; x has 65"),
        ({"x": jnp.zeros((0, 128), jnp.bfloat16)}, "takes 1 to 64 rows; x has 0"),
        (
            {"x": jnp.zeros((4, 72), jnp.bfloat16), "weights": jnp.zeros((1, 72, 64), jnp.bfloat16)},
            "inputs .* 64; .* 72",
        ),
        ({"weights": jnp.zeros((1, 128, 40), jnp.bfloat16)}, "outputs .* 16; .* 40"),
        ({"x": jnp.zeros((4, 128)), "weights": jnp.zeros((1, 128, 64))}, "16-bit .* float32"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"implementation": "mosaic_gpu"} | Case("", 4, 128, 64).make(seed=0) | changes
    with pytest.raises(ValueError, match=message):
        row_product(**arguments)
