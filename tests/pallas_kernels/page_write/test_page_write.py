"""The page write against an assignment loop, and in place in compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_write.api import page_write, write_pages, write_parts
from pallas_kernels.page_write.cases import SMALL, SMALL_PAGES
from pallas_kernels.page_write.parts import Pages, Rows

PAGE = 64
LAYERS, WIDTH, ROWS = 3, 16, 10


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_assignment(case):
    arguments = case.make(seed=1)
    expected = np.array(arguments["pool"])
    for row, slot in zip(np.asarray(arguments["rows"]), arguments["slots"], strict=True):
        if slot >= 0:
            expected[arguments["layer"], slot // PAGE, slot % PAGE] = row
    np.testing.assert_array_equal(jax.jit(page_write)(**arguments), expected)


@pytest.mark.parametrize("case", SMALL_PAGES, ids=lambda case: case.name)
def test_pages_equal_assignment_row_by_row(case):
    arguments = case.make(seed=1)
    expected = np.array(arguments["pool"])
    for (tile, column), page in np.ndenumerate(arguments["pages"]):
        for row in range(PAGE if 0 <= page < case.pages else 0):
            part = arguments["values"][case.first_row + tile * PAGE + row, column * case.width :][: case.width]
            expected[arguments["layer"], page, row, : len(part)] = part
    write = functools.partial(write_pages, first_row=arguments.pop("first_row"))
    np.testing.assert_array_equal(jax.jit(write)(**arguments), expected)


def test_slots_past_the_pool_are_dropped():
    pool = jnp.zeros((1, 2, PAGE, 4))
    written = page_write(pool, 0, jnp.ones((3, 4)), jnp.array([2 * PAGE, 2**31 - 1, -(2**31)], jnp.int32))
    np.testing.assert_array_equal(written, pool)


def shapes(pages):
    shaped = jax.ShapeDtypeStruct
    pool = shaped((LAYERS, pages, PAGE, WIDTH), jnp.float32)
    return pool, shaped((ROWS, WIDTH), jnp.float32), shaped((ROWS,), jnp.int32)


def write_one(pool, rows, slots):
    return page_write(pool, 1, rows, slots)


def write_in_scan(pool, rows, slots):
    """Every layer writes what the layer before it read."""

    def layer_step(carry, layer):
        pool, rows = carry
        pool = page_write(pool, layer, rows, slots)
        gathered = pool[layer, slots // PAGE, slots % PAGE]
        return (pool, rows + jnp.tanh(gathered)), None

    return jax.lax.scan(layer_step, (pool, rows), jnp.arange(LAYERS))[0]


@pytest.mark.parametrize("program", [write_one, write_in_scan])
def test_a_donated_pool_is_written_in_place(program):
    def memory(pages):
        compiled = jax.jit(program, donate_argnums=0).lower(*shapes(pages)).compile()
        return compiled.memory_analysis()

    small, large = memory(4), memory(4096)
    assert large.alias_size_in_bytes == LAYERS * 4096 * PAGE * WIDTH * 4
    assert large.temp_size_in_bytes == small.temp_size_in_bytes
    assert large.temp_size_in_bytes < 16 * ROWS * WIDTH * 4  # some copies of the rows


def test_scan_writes_every_layer():
    case = SMALL[0].make(seed=2)
    slots = np.maximum(case["slots"][:ROWS], 0)
    slots = np.unique(slots).astype(np.int32)
    rows = case["rows"][: len(slots)].astype(jnp.float32)
    pool, _ = jax.jit(write_in_scan)(jnp.zeros((LAYERS, 5, PAGE, rows.shape[1])), rows, slots)
    expected = np.asarray(rows, np.float64)
    for layer in range(LAYERS):
        np.testing.assert_allclose(pool[layer].reshape(-1, rows.shape[1])[slots], expected, rtol=1e-6, atol=1e-6)
        expected = expected + np.tanh(expected)


@pytest.mark.parametrize(
    ("rows", "slots", "message"),
    [
        (np.zeros((3, 15), np.float32), np.zeros(3, np.int32), r"\(3, 15\) do not fit pages of rows of 16 values"),
        (np.zeros((3, 16), np.float16), np.zeros(3, np.int32), "rows are float16, the pool is float32"),
        (np.zeros((3, 16), np.float32), np.zeros(4, np.int32), r"slots of shape \(4,\) for 3 rows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(rows, slots, message):
    with pytest.raises(ValueError, match=message):
        page_write(jnp.zeros((1, 2, PAGE, 16)), 0, rows, slots)


@pytest.mark.parametrize(
    ("values", "pages", "first_row", "message"),
    [
        (np.zeros((64, 40), np.float32), np.zeros((1, 2), np.int32), 0, r"shape \(1, 2\) for 40 columns; .* need 3"),
        (np.zeros((64, 16), np.float32), np.zeros((1, 1), np.int32), 1, "1 tiles from row 1 reach to row 65 of 64"),
        (np.zeros((64, 16), np.float16), np.zeros((1, 1), np.int32), 0, "rows are float16, the pool is float32"),
        (np.zeros((1, 64, 16), np.float32), np.zeros((1, 1), np.int32), 0, r"shape \(1, 64, 16\) are no matrix"),
    ],
)
def test_pages_that_do_not_fit_are_refused(values, pages, first_row, message):
    with pytest.raises(ValueError, match=message):
        write_pages(jnp.zeros((1, 2, PAGE, 16)), 0, values, pages, first_row=first_row)


def test_every_part_is_checked():
    pool, values, pages = jnp.zeros((1, 2, PAGE, 16)), jnp.zeros((PAGE, 24)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"rows of shape \(64, 24\) do not fit pages of rows of 16 values"):
        write_parts(pool, 0, [Pages(values, pages), Rows(values, pages[0])])


def test_more_columns_than_there_are_are_refused():
    pool, values, pages = jnp.zeros((1, 2, PAGE, 16)), jnp.zeros((PAGE, 16)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"page_write: 17 columns of values of shape \(64, 16\)"):
        write_pages(pool, 0, values, pages, columns=17)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="page_write: no implementation 'fast'; it has mosaic_gpu, .*, reference"):
        functools.partial(page_write, implementation="fast")(**SMALL[1].make(seed=0))
