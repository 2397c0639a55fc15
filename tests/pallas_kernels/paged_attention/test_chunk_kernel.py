"""The chunk kernel of paged attention, in the interpreter and on a GPU, against a dense softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.cases import Case
from tests.pallas_kernels.paged_attention.oracle import ON_BOTH, assert_close, dense

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

run = jax.jit(paged_attention, static_argnames=("kv_heads", "scale", "implementation"))


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
