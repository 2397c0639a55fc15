"""Rows of the tape: what is written is read back, and nothing else is touched."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.state import TapeLayout
from flexjax.steps import tape

LAYOUT = TapeLayout(names=("x", "attention", "up"), widths=(6, 9, 8), row=4)
"""x takes two pages per 64 tokens, attention three (three columns of padding), up two."""


def values(width: int, tokens: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + width).standard_normal((tokens, width)).astype(np.float32)


def test_names_take_whole_pages_one_after_another():
    assert [LAYOUT.span(name) for name in LAYOUT.names] == [2, 3, 2]
    assert [LAYOUT.first_column(name) for name in LAYOUT.names] == [0, 2, 5]
    assert LAYOUT.columns == 7


def test_rows_are_cut_as_drawn():
    """The drawing in `as_rows`: five values of a token in rows of three."""
    value = np.arange(64 * 5).reshape(64, 5)
    rows = np.asarray(tape.as_rows(jnp.asarray(value), 3))
    assert rows.shape == (1, 2, 64, 3)
    assert rows[0, :, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert rows[0, :, 63].tolist() == [[315, 316, 317], [318, 319, 0]]
    np.testing.assert_array_equal(tape.from_rows(jnp.asarray(rows), 5), value)


def test_slots_of_pages():
    slots = np.asarray(tape.tile_slots(jnp.array([3, -1])))
    assert slots[0].tolist() == list(range(192, 256)) and set(slots[1].tolist()) == {-1}


def test_what_is_written_is_read_and_nothing_else_changes():
    """Two tiles of which the second is idle; "q" is not kept."""
    pool = jnp.asarray(np.random.default_rng(1).standard_normal((2, 20, 64, 4)), jnp.float32)
    pages = np.array([[3, 19, 7, 0, 11, 5, 2], [-1] * 7])
    given = {name: jnp.asarray(values(width)) for name, width in dict(q=4, up=8, attention=9, x=6).items()}
    written = tape.write_named(pool, 1, LAYOUT, jnp.asarray(pages), given, tp=1, implementation="reference")
    got = tape.read_named(written, 1, LAYOUT, jnp.asarray(pages[:1]), tp=1)
    assert got.keys() == set(LAYOUT.names)
    for name, value in got.items():
        np.testing.assert_array_equal(value, given[name][:64])
    untouched = np.setdiff1d(np.arange(20), pages[0])
    np.testing.assert_array_equal(written[0], pool[0])
    np.testing.assert_array_equal(written[1, untouched], pool[1, untouched])


def test_idle_tiles_read_zeros():
    """Whatever page 0, or any other, holds."""
    pool = jnp.full((1, 4, 64, 4), jnp.nan)
    assert not np.any(tape.read(pool, 0, jnp.array([[-1, -1]]), 6))


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 0.0), (jnp.bfloat16, 2.0**-16)])
def test_log_sum_exp_travels_with_attention(dtype, error):
    attention = jnp.asarray(values(12).reshape(128, 3, 4), dtype)
    lse = jnp.asarray(10 * values(3))
    packed = tape.pack_attention(attention, lse)
    assert packed.dtype == dtype
    got_attention, got_lse = tape.unpack_attention(packed, 3, 4)
    np.testing.assert_array_equal(got_attention, attention)
    assert got_lse.dtype == jnp.float32
    np.testing.assert_allclose(got_lse, lse, rtol=error)
