"""Paged attention against loops over queries and heads in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention.cases import SMALL, Case

PAGE = 64
CASE = Case("two tiles", 6, 2, 8, 64, (64, 0), (40, 64), 3, dtype="float32")


def oracle(q, pool, layer, tables, positions, lengths, *, kv_heads, scale):
    """One dense softmax per query and head, over keys collected one page at a time."""
    q, pool = np.asarray(q).astype(np.float64), np.asarray(pool).astype(np.float64)
    tiles, queries, heads, head_size = q.shape
    out, lse = np.zeros(q.shape), np.zeros((tiles, queries, heads))
    for tile in range(tiles):
        for query in range(lengths[tile]):
            context = positions[tile] + query + 1
            pages = tables[tile, : -(-context // PAGE)]
            rows = np.concatenate([pool[layer, page] for page in pages])[:context]
            rows = rows.reshape(context, 2, kv_heads, head_size)
            for head in range(heads):
                keys, values = rows[:, 0, head * kv_heads // heads], rows[:, 1, head * kv_heads // heads]
                scores = keys @ q[tile, query, head] * scale
                weights = np.exp(scores - scores.max())
                out[tile, query, head] = weights @ values / weights.sum()
                lse[tile, query, head] = scores.max() + np.log(weights.sum())
    return out, lse


run = jax.jit(paged_attention, static_argnames=("kv_heads", "scale"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_dense_softmax_in_float64(case):
    arguments = case.make(seed=1)
    out, lse = run(**arguments)
    expected, expected_lse = oracle(**arguments)
    # Everything is computed in float32 (sums of up to 322 terms near 1); bfloat16 then rounds the result to 8 bits.
    relative = 2.0**-8 if case.dtype == "bfloat16" else 1e-5
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=relative, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_beyond_the_length_are_exactly_zero():
    out, lse = run(**CASE.make(seed=2))
    assert not np.any(np.asarray(out[0, 40:])) and not np.any(np.asarray(lse[0, 40:]))
    assert np.all(np.asarray(lse[0, :40]) != 0)


def test_unused_rows_do_not_matter():
    results = [run(**CASE.make(seed=3, unused=unused)) for unused in (0.0, float("nan"), float("inf"), 1e30)]
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def test_queries_of_an_inactive_tile_do_not_matter():
    arguments = CASE.make(seed=4) | {"lengths": np.array([0, 64], np.int32)}
    expected = run(**arguments)
    arguments["q"][0] = np.nan
    poisoned = run(**arguments)
    for got, want in zip(poisoned, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_where_pages_lie_does_not_matter():
    arguments = CASE.make(seed=5, unused=0.0)
    pages = arguments["pool"].shape[1]
    order = np.random.default_rng(0).permutation(pages)
    tables = arguments["tables"].copy()
    tables[tables >= 0] = np.argsort(order)[tables[tables >= 0]]
    moved = arguments | {"pool": arguments["pool"][:, order], "tables": tables}
    for got, want in zip(run(**moved), run(**arguments), strict=True):
        np.testing.assert_array_equal(got, want)


def test_large_scores_do_not_overflow():
    arguments = CASE.make(seed=6)
    arguments["q"] *= 1000
    out, lse = run(**arguments)
    expected, expected_lse = oracle(**arguments)
    # Scores near 3000 carry float32 errors near 3e-4, and so, relatively, do the weights.
    np.testing.assert_allclose(out, expected, atol=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


def test_position_length_and_layer_are_data():
    arguments = CASE.make(seed=7, unused=0.0)
    static = {name: arguments.pop(name) for name in ("kv_heads", "scale")}
    traces = []

    @jax.jit
    def attend(**arrays):
        traces.append(1)
        return paged_attention(**arrays, **static)

    for layer, position, length in ((0, 0, 1), (1, 5, 59), (0, 64, 64)):
        changes = {"layer": np.int32(layer), "positions": np.array([position, 0], np.int32)}
        changes["lengths"] = np.array([length, 64], np.int32)
        changed = arguments | changes | {"tables": np.maximum(arguments["tables"], 0)}
        expected, _ = oracle(**changed, **static)
        np.testing.assert_allclose(attend(**changed)[0], expected, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_temporaries_grow_neither_with_the_table_nor_with_the_pool():
    def temporaries(pages, pages_per_sequence):
        shaped = jax.ShapeDtypeStruct
        vector = shaped((2,), jnp.int32)
        compiled = jax.jit(functools.partial(paged_attention, kv_heads=2, scale=1.0)).lower(
            shaped((2, 1, 6, 8), jnp.float32),
            shaped((2, pages, PAGE, 32), jnp.float32),
            shaped((), jnp.int32),
            shaped((2, pages_per_sequence), jnp.int32),
            vector,
            vector,
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(512, 256) < temporaries(8, 4) + 4 * 2 * 256  # at most a copy of the table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, "6 query heads are not a multiple of 4 K/V heads"),
        ({"kv_heads": 3}, "have 32 values; K and V of 3 heads of 8 need 48"),
        ({"positions": np.zeros(3, np.int32)}, "positions has 3 entries for 2 tiles"),
        ({"implementation": "fast"}, "no implementation 'fast'; it has .*reference"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**CASE.make(seed=0) | change)
