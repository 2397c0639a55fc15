"""The Mosaic kernels of the page writes against assignments, in the interpreter and on a GPU, and their demands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_write.api import page_write, write_pages
from pallas_kernels.page_write.cases import SMALL, SMALL_PAGES
from pallas_kernels.page_write.tiling import PieceTiling, piece_tiling, rows_per_block

PAGE = 64

implementations = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)


@implementations
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_rows_equal_assignment(case, implementation, no_races):
    arguments = case.make(seed=1)
    expected = np.array(arguments["pool"])
    for row, slot in zip(arguments["rows"], arguments["slots"], strict=True):
        if slot >= 0:
            expected[arguments["layer"], slot // PAGE, slot % PAGE] = row
    written = jax.jit(functools.partial(page_write, implementation=implementation))(**arguments)
    np.testing.assert_array_equal(written, expected)


@implementations
def test_more_rows_than_slots_and_slots_past_the_pool(implementation, no_races):
    pool = np.zeros((1, 2, PAGE, 8), np.float32)
    slots = np.array([2 * PAGE, 5, 2**31 - 1, -(2**31), 127], np.int32)
    rows = np.arange(7 * 8, dtype=np.float32).reshape(7, 8)
    written = jax.jit(functools.partial(page_write, implementation=implementation))(pool, 0, rows, slots)
    pool[0, 0, 5], pool[0, 1, 63] = rows[1], rows[4]
    np.testing.assert_array_equal(written, pool)


@implementations
@pytest.mark.parametrize("case", SMALL_PAGES, ids=lambda case: case.name)
def test_pages_equal_assignment(case, implementation, no_races):
    arguments = case.make(seed=2)
    expected = np.array(arguments["pool"])
    values = arguments["values"][case.first_row :]
    for (tile, column), page in np.ndenumerate(arguments["pages"]):
        if 0 <= page < case.pages:
            part = values[tile * PAGE :][:PAGE, column * case.width :][:, : case.width]
            expected[arguments["layer"], page, :, : part.shape[1]] = part
    write = functools.partial(write_pages, first_row=arguments.pop("first_row"), implementation=implementation)
    np.testing.assert_array_equal(jax.jit(write)(**arguments), expected)


@implementations
@pytest.mark.parametrize("columns", [16, 24, 32])
def test_what_lies_behind_the_columns_is_not_written(columns, implementation, no_races):
    """Pages of 16 columns, two tiles, values of 40 columns; the last page of a tile keeps what it held behind them."""
    random = np.random.default_rng(4)
    pool, values = random.standard_normal((1, 6, PAGE, 16)), random.standard_normal((2 * PAGE, 40))
    pool, values = pool.astype(np.float32), values.astype(np.float32)
    pages = np.array([[4, 1], [0, 5]], np.int32)[:, : -(-columns // 16)]
    write = functools.partial(write_pages, columns=columns, implementation=implementation)
    expected = pool.copy()
    for (tile, column), page in np.ndenumerate(pages):
        part = values[tile * PAGE :][:PAGE, column * 16 : min(column * 16 + 16, columns)]
        expected[0, page, :, : part.shape[1]] = part
    np.testing.assert_array_equal(jax.jit(write)(pool, 0, values, pages), expected)


def test_the_layer_is_data(no_races):
    """One program writes every layer, each from what the layer before it holds."""
    case = SMALL_PAGES[0]
    arguments = case.make(seed=3)
    pages = np.maximum(arguments["pages"][:1, :1], 0)
    write = functools.partial(write_pages, pages=pages, implementation="mosaic_gpu_interpreted")

    @jax.jit
    def program(pool, values):
        copy = lambda pool, layer: write(pool, layer, pool[layer - 1, pages[0, 0]])
        return copy(copy(write(pool, jnp.int32(0), values), jnp.int32(1)), jnp.int32(2))

    values = arguments["values"][:PAGE, : case.width]
    written = program(np.zeros((3, *arguments["pool"].shape[1:]), values.dtype), values)
    for layer in range(3):
        np.testing.assert_array_equal(written[layer, pages[0, 0]], values)


def test_pieces_tile_every_width():
    for width, columns in ((2048, 2048), (2048, 4160), (384, 576), (1024, 18944), (16, 40)):
        tiling = piece_tiling(8, PAGE, width, columns)
        assert width % tiling.columns == columns % tiling.columns == PAGE % tiling.rows == 0


def test_blocks_are_many_and_small():
    assert [rows_per_block(rows, 4096) for rows in (1, 64, 263, 264, 768, 2048)] == [1, 1, 1, 2, 4, 4]
    assert rows_per_block(2048, 57344) == 1  # bytes of a row limit the rows
    assert piece_tiling(32, PAGE, 2048, 2048) == PieceTiling(PAGE, 64, 4)
    assert piece_tiling(1, PAGE, 2048, 2048) == PieceTiling(PAGE, 64, 1)


def test_rows_that_the_copy_engine_cannot_move_are_refused():
    pool = jnp.zeros((1, 2, PAGE, 12), jnp.bfloat16)
    with pytest.raises(ValueError, match="page_write: the Mosaic GPU kernel copies rows of multiples of 16 bytes, not"):
        page_write(pool, 0, pool[0, 0], jnp.arange(3), implementation="mosaic_gpu")
    pool = jnp.zeros((1, 2, PAGE, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="write_pages: the Mosaic GPU kernel .*, not 20 bfloat16"):
        write_pages(pool, 0, jnp.zeros((64, 20), pool.dtype), jnp.zeros((1, 2), jnp.int32), implementation="mosaic_gpu")
