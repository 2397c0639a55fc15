"""The chunk kernel of paged attention, in the interpreter and on a GPU, against a dense softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cases import Case

PAGE = 64

ALIGNED = Case("prompt chunk, group of 4", 4, 1, 128, 64, (192, 256, 320), (64, 64, 23), 6, one_sequence=True)
UNALIGNED = Case("any position, group of 3", 6, 2, 64, 64, (0, 5, 100, 190), (1, 64, 64, 33), 4, layers=3)
CASES = (
    ALIGNED,
    UNALIGNED,
    Case("inactive tiles between others, group of 2", 2, 1, 128, 64, (64, 0, 60), (0, 64, 63), 3),
    Case("long after short, group of 1", 2, 2, 64, 64, (3, 330), (1, 2), 7),
    Case("group of 7", 7, 1, 64, 64, (65,), (63,), 2),
    Case("every tile inactive", 2, 1, 64, 64, (0, 64), (0, 0), 3),
    Case("float16", 2, 1, 64, 64, (60,), (64,), 2, dtype="float16"),
)

ON_BOTH = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)

run = jax.jit(paged_attention, static_argnames=("kv_heads", "scale", "implementation"))


def dense(q, pool, layer, tables, positions, lengths, *, kv_heads, scale):
    """out and lse in float64, one tile and head at a time, over all keys that the tile's last query sees."""
    tiles, queries, heads, head_size = q.shape
    out, lse = np.zeros(q.shape), np.zeros((tiles, queries, heads))
    for tile in np.flatnonzero(lengths):
        there = slice(lengths[tile])
        context = positions[tile] + lengths[tile]
        pages = pool[layer, tables[tile, : -(-context // PAGE)]].astype(np.float64)
        keys, values = pages.reshape(-1, 2, kv_heads, head_size)[:context].transpose(1, 2, 0, 3)
        behind = np.arange(context) > positions[tile] + np.arange(lengths[tile])[:, None]
        for head in range(heads):
            scores = q[tile, there, head].astype(np.float64) @ keys[head * kv_heads // heads].T * scale
            scores[behind] = -np.inf
            lse[tile, there, head] = np.logaddexp.reduce(scores, axis=1)
            weights = np.exp(scores - lse[tile, there, head, None])
            out[tile, there, head] = weights @ values[head * kv_heads // heads]
    return out, lse


def assert_close(got, expected):
    """Weights are rounded to bfloat16 (relative error 2**-9, both ways), and so is the result; values are near 1."""
    out, lse = got
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=2.0**-7, atol=2.0**-7)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


@ON_BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_softmax_in_float64(case, implementation, no_races):
    arguments = case.make(seed=1)
    out, lse = run(**arguments, implementation=implementation)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    assert_close((out, lse), dense(**arguments))
    missing = np.arange(64) >= np.array(case.lengths)[:, None]
    assert not np.any(np.asarray(out)[missing]) and not np.any(np.asarray(lse)[missing])


@ON_BOTH
def test_queries_that_are_not_there_may_hold_anything(implementation, no_races):
    case = UNALIGNED
    arguments = case.make(seed=2)
    expected = dense(**arguments)
    arguments["q"][np.arange(64) >= np.array(case.lengths)[:, None]] = np.nan
    out, lse = run(**arguments, implementation=implementation)
    assert_close((out, lse), expected)


@ON_BOTH
def test_large_scores_do_not_overflow(implementation, no_races):
    arguments = UNALIGNED.make(seed=3)
    arguments["q"] *= 1000
    out, lse = run(**arguments, implementation=implementation)
    expected, expected_lse = dense(**arguments)
    # Scores near 3000 carry float32 errors near 3e-4; the weights are rounded to bfloat16.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


@pytest.mark.gpu
def test_unused_rows_do_not_matter():
    results = [run(**ALIGNED.make(seed=4, unused=unused), implementation="mosaic_gpu") for unused in (0.0, np.nan)]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.gpu
def test_long_prompts():
    """More items than thread blocks, so that buffers pass from item to item."""
    case = Case("a long prompt", 32, 8, 128, 64, tuple(range(0, 2048, 64)), (64,) * 31 + (40,), 32, one_sequence=True)
    arguments = case.make(seed=5)
    assert_close(run(**arguments, implementation="mosaic_gpu"), dense(**arguments))
