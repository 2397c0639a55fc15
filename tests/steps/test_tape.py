"""Rows of the tape: what is written is read back, and nothing else is touched."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.state import TapeLayout
from flexjax.steps import tape
from pallas_kernels import write_parts

LAYOUT = TapeLayout(names=("x", "attention", "up"), widths=(6, 9, 8), row=4)
"""x takes two pages per 64 tokens, attention three (three columns of padding), up two."""


def values(width: int, tokens: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + width).standard_normal((tokens, width)).astype(np.float32)


def test_names_take_whole_pages_one_after_another():
    assert [LAYOUT.span(name) for name in LAYOUT.names] == [2, 3, 2]
    assert [LAYOUT.first_column(name) for name in LAYOUT.names] == [0, 2, 5]
    assert LAYOUT.columns == 7


@pytest.mark.parametrize("feed_forward", [7, 8], ids=["part of a page", "whole pages"])
def test_what_is_written_is_read_and_nothing_else_changes(feed_forward):
    """Two tiles of which the second is idle, after three rows that are no tile; "q" and "gate" are not kept. Behind
    gate and up lies something else."""
    layout = TapeLayout(LAYOUT.names, (6, 9, feed_forward), LAYOUT.row)
    pool = jnp.asarray(np.random.default_rng(1).standard_normal((2, 20, 64, 4)), jnp.float32)
    pages = np.array([[3, 19, 7, 0, 11, 5, 2], [-1] * 7])
    widths = dict(q=4, gate=feed_forward, up=feed_forward, attention=9, x=6)
    given = {name: jnp.asarray(values(width, tokens=131)) for name, width in widths.items()}
    gate_up = jnp.concatenate([given.pop("gate"), given["up"], jnp.full((131, 5), jnp.nan)], axis=1)
    options = dict(first_row=3, row=LAYOUT.row, tp=1)
    others = {name: value for name, value in given.items() if name != "up"}
    tables = tape.write_tables(layout, jnp.asarray(pages), feed_forward, LAYOUT.row)
    kept = tape.parts(tables, others, **options) + tape.gate_up_parts(tables, gate_up, feed_forward, **options)
    written = write_parts(pool, 1, kept)
    got = tape.read_named(written, 1, layout, jnp.asarray(pages[:1]), tp=1)
    assert got.keys() == set(layout.names)
    for name, value in got.items():
        np.testing.assert_array_equal(value, given[name][3:67])
    untouched = np.setdiff1d(np.arange(20), pages[0])
    np.testing.assert_array_equal(written[0], pool[0])
    np.testing.assert_array_equal(written[1, untouched], pool[1, untouched])


@pytest.mark.parametrize(("kept", "columns"), [("gate", 8), ("up", 16), ("gate up", 16)])
def test_up_is_not_read_where_gate_alone_is_kept(kept, columns):
    """Of gate and up of two pages each, what lies behind gate."""
    layout = TapeLayout(("x", *kept.split()), (6, *[8] * len(kept.split())), 4)
    tables = tape.write_tables(layout, jnp.arange(layout.columns)[None], 8, 4)
    (part,) = tape.gate_up_parts(tables, jnp.zeros((64, 20)), 8, first_row=0, row=4, tp=1)
    assert part.columns == columns
    assert [page for page in part.pages[0].tolist() if page >= 0] == list(range(2, layout.columns))


def test_what_of_gate_and_up_a_tape_keeps():
    """Seventy rows are two tiles, of which the first has six. A tape that names up; the second tile is idle, and the
    third of a lean tape of x alone."""
    pages = jnp.array([[3, 19, 7, 0, 11, 5, 2], [-1] * 7, [3, 4, -1, -1, -1, -1, -1]])
    neither, up = [False, False], [False, True]
    np.testing.assert_array_equal(tape.gated_tiles(LAYOUT, pages, 70), [neither, neither, up, neither, neither])
    assert tape.gated_tiles(LAYOUT, pages, 0).shape == (3, 2)
    assert tape.gated_tiles(TapeLayout(("x", "attention"), (6, 9), 4), pages, 70) is None


def test_idle_tiles_read_zeros():
    """Whatever page 0, or any other, holds."""
    pool = jnp.full((1, 4, 64, 4), jnp.nan)
    assert not np.any(tape.read(pool, 0, jnp.array([[-1, -1]]), 6))


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 0.0), (jnp.bfloat16, 2.0**-16)])
def test_log_sum_exps_of_all_layers_lie_side_by_side(dtype, error):
    """Two layers, three heads."""
    lse = jnp.asarray([10 * values(3), 10 * values(3, seed=1)])
    packed = tape.pack_lse(lse, dtype)
    assert (packed.dtype, len(packed)) == (dtype, 128)
    for layer, value in enumerate(jnp.split(packed, 2, axis=1)):
        got = tape.unpack_lse(value, 3)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, lse[layer], rtol=error)
