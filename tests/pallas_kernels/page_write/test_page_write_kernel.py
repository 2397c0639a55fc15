"""The Mosaic kernels of the page writes against assignments, in the interpreter and on a GPU, and their demands."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import INTERPRETER
from pallas_kernels.page_write import kernel
from pallas_kernels.page_write.api import page_write, write_pages, write_parts
from pallas_kernels.page_write.cases import SMALL, SMALL_PAGES, SMALL_PARTS
from pallas_kernels.page_write.parts import Pages, Rows, Tiles, tiles_of
from pallas_kernels.page_write.tiling import PieceTiling, piece_tilings

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


everywhere = pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)


@everywhere
@pytest.mark.parametrize("case", SMALL_PARTS, ids=lambda case: case.name)
def test_parts_equal_assignment(case, implementation, no_races):
    """One call writes them all; nothing else of the pool changes, and nothing of it gets anywhere."""
    arguments = case.make(seed=5)
    pool = np.full_like(arguments["pool"], np.nan)
    written = jax.jit(functools.partial(write_parts, implementation=implementation))(**arguments | {"pool": pool})
    expected = assigned(pool, arguments["layer"], arguments["parts"])
    np.testing.assert_array_equal(np.float32(written), np.float32(expected))


@everywhere
def test_parts_of_one_matrix(implementation, no_races):
    """Leading columns of it, rows of it, and a part that asks for nothing."""
    random = np.random.default_rng(6)
    pool = random.standard_normal((2, 9, PAGE, 16)).astype(np.float32)
    values = random.standard_normal((2 * PAGE + 5, 40)).astype(np.float32)
    parts = [
        Pages(values, np.array([[8, 1], [3, 0]], np.int32), first_row=5, columns=24),
        Rows(values[:, :16], np.array([2 * PAGE + 63, 4 * PAGE], np.int32)),
        Pages(values, np.zeros((0, 3), np.int32)),
        Pages(values, np.array([[7], [5]], np.int32), columns=8),
    ]
    written = jax.jit(functools.partial(write_parts, implementation=implementation))(pool, 1, parts)
    np.testing.assert_array_equal(written, assigned(pool, 1, parts))


def test_pieces_of_every_shape_are_staged_in_one_place(monkeypatch):
    """Here too as on a GPU where no races are looked for, between blocks that each have a place of their own."""
    union, unions = plgpu.RefUnion, []
    monkeypatch.setattr(plgpu, "RefUnion", lambda *refs: unions.append(refs) or union(*refs))
    random = np.random.default_rng(7)
    pool = random.standard_normal((2, 6, PAGE, 32)).astype(np.float32)
    values = random.standard_normal((PAGE + 3, 48)).astype(np.float32)
    parts = [
        Pages(values, np.array([[4, 1]], np.int32), first_row=3),
        Rows(values[:, :32], np.array([2 * PAGE, -1, 3 * PAGE + 7], np.int32)),
        Pages(values, np.array([[5]], np.int32), columns=8),
    ]
    interpret = dataclasses.replace(INTERPRETER, detect_races=False)
    write = functools.partial(kernel.write_parts, interpret=interpret)
    written = jax.jit(lambda pool, parts: write(pool, 1, [tiles_of(part, pool) for part in parts]))(pool, parts)
    assert [[ref.shape for ref in refs] for refs in unions] == [[(1, 32), (1, PAGE, 8), (1, PAGE, 16)]]
    np.testing.assert_array_equal(written, assigned(pool, 1, parts))


def assigned(pool, layer, parts):
    """The pool with one row of one page after another put into it."""
    expected, (_, pages, _, width) = np.array(pool), pool.shape
    for part in parts:
        if isinstance(part, Rows):
            for row, slot in zip(part.rows, part.slots, strict=False):
                if 0 <= slot < pages * PAGE:
                    expected[layer, slot // PAGE, slot % PAGE] = row
            continue
        values = part.values[:, : part.columns]
        for (tile, column), page in np.ndenumerate(part.pages):
            for row in range(PAGE if 0 <= page < pages else 0):
                own = values[part.first_row + tile * PAGE + row, column * width :][:width]
                expected[layer, page, row, : len(own)] = own
    return expected


def test_no_parts_leave_the_pool_as_it_was():
    pool = jnp.ones((1, 2, PAGE, 16))
    assert write_parts(pool, 0, [], implementation="mosaic_gpu") is pool
    nothing = Pages(jnp.zeros((0, 16)), jnp.zeros((0, 1), jnp.int32))
    assert write_parts(pool, 0, [nothing], implementation="mosaic_gpu") is pool


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


def tilings(width: int, *parts: tuple[int, int, int]):
    """Of parts of so many tiles of (rows, columns)."""
    shaped = jax.ShapeDtypeStruct

    def tiles(count, rows, columns):
        places = shaped((count, -(-columns // width)), jnp.int32)
        return Tiles(shaped((count * rows, columns), jnp.bfloat16), places, rows, 0, columns)

    return piece_tilings([tiles(*part) for part in parts], width)


def test_pieces_tile_every_width():
    for width, columns in ((2048, 2048), (2048, 4160), (384, 576), (1024, 18944), (16, 40)):
        (tiling,) = tilings(width, (8, PAGE, columns))
        assert width % tiling.columns == columns % tiling.columns == 0
        assert (tiling.rows, tiling.count) == (PAGE, 8 * columns // tiling.columns)


def test_blocks_are_many_and_small():
    in_flight = lambda rows, width: tilings(width, (rows, 1, width))[0].pieces
    assert [in_flight(rows, 2048) for rows in (1, 64, 263, 264, 768, 2048)] == [1, 1, 1, 2, 4, 4]
    assert in_flight(2048, 28672) == 1  # bytes of a row limit the rows
    assert tilings(2048, (32, PAGE, 2048)) == [PieceTiling(PAGE, 64, 4, count=1024)]
    assert tilings(2048, (1, PAGE, 2048)) == [PieceTiling(PAGE, 64, 1, count=32)]


def test_parts_of_one_write_fill_the_device_together():
    """Rows and one tile, 96 pieces, would leave multiprocessors idle, and 32 tiles beside them do not."""
    rows, tile, tiles = (64, 1, 2048), (1, PAGE, 2048), (32, PAGE, 2048)
    assert tilings(2048, rows, tile) == [PieceTiling(1, 2048, 1, count=64), PieceTiling(PAGE, 64, 1, count=32)]
    few, many = tilings(2048, rows, tiles)
    assert (few.pieces, few.blocks, many.pieces, many.blocks) == (4, 16, 4, 256)


def test_rows_that_the_copy_engine_cannot_move_are_refused():
    pool = jnp.zeros((1, 2, PAGE, 12), jnp.bfloat16)
    with pytest.raises(ValueError, match="page_write: the Mosaic GPU kernel copies rows of multiples of 16 bytes, not"):
        page_write(pool, 0, pool[0, 0], jnp.arange(3), implementation="mosaic_gpu")
    pool = jnp.zeros((1, 2, PAGE, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="page_write: the Mosaic GPU kernel .*, not 20 bfloat16"):
        write_pages(pool, 0, jnp.zeros((64, 20), pool.dtype), jnp.zeros((1, 2), jnp.int32), implementation="mosaic_gpu")
