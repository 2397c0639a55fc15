"""Decode rows and tiles of chunks in one call, against a dense softmax in float64 of each."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Sequences, mixed_paged_attention, paged_attention, plan_paged_attention
from pallas_kernels.paged_attention.cases import Case, MixedCase, joined
from tests.pallas_kernels.paged_attention.oracle import PAGE, assert_close, dense

ROWS = Case("rows", 8, 2, 64, 1, (3, 200, 0, 64, 5, 0, 63, 70), (1, 1, 0, 1, 0, 1, 1, 1), 4)
TILES = Case("tiles", 8, 2, 64, PAGE, (64, 0, 5), (64, 0, 33), 3)
FIVE = replace(ROWS, positions=(3, 200, 0, 64, 5), lengths=(1, 1, 0, 1, 0))
CASES = {
    "mixed": MixedCase(ROWS, TILES),
    "no multiple of 8 rows": MixedCase(FIVE, TILES),
    "all rows idle": MixedCase(replace(ROWS, lengths=(0,) * 8), TILES),
    "all tiles idle": MixedCase(ROWS, replace(TILES, lengths=(0, 0, 0))),
    "group of 1, head size 128": MixedCase(*(replace(each, query_heads=2, head_size=128) for each in (ROWS, TILES))),
}
ON_ALL = pytest.mark.parametrize(
    "implementation", ["reference", "mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)


@functools.partial(jax.jit, static_argnames=("kv_heads", "scale", "implementation", "planned"))
def run(q, pool, layer, rows, tiles, *, planned=False, **options):
    def planned_for(sequences, queries):
        sizes = dict(queries=queries, query_heads=q.shape[1], kv_heads=options["kv_heads"], head_size=q.shape[2])
        made = plan_paged_attention(*sequences[1:3], **sizes, implementation=options["implementation"])
        return sequences._replace(plan=made if planned else None)

    return mixed_paged_attention(q, pool, layer, planned_for(rows, 1), planned_for(tiles, PAGE), **options)


@ON_ALL
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_softmax_in_float64(name, implementation, no_races):
    own, others = CASES[name].make_apart(seed=1)
    out, rows_lse, tiles_lse = run(**joined(own, others), implementation=implementation)
    rows = len(own["q"])
    assert out.dtype == ROWS.dtype and rows_lse.dtype == tiles_lse.dtype == jnp.float32
    assert_close((out[:rows, None], rows_lse[:, None]), dense(**own))
    tiles = out[rows:].reshape(others["q"].shape), tiles_lse
    assert_close(tiles, dense(**others))
    missing = np.arange(PAGE) >= others["lengths"][:, None]
    assert not any(np.any(np.asarray(each)[missing]) for each in tiles)
    assert not any(np.any(np.asarray(each)[: rows][own["lengths"] == 0]) for each in (out, rows_lse))


@ON_ALL
def test_equals_calls_for_rows_and_for_tiles_to_the_bit(implementation, no_races):
    """With plans too, and for queries that are not there and not finite."""
    own, others = CASES["mixed"].make_apart(seed=2)
    for each in own, others:
        each["q"][np.arange(each["q"].shape[1]) >= each["lengths"][:, None]] = np.nan
    out, *lse = run(**joined(own, others), implementation=implementation, planned=True)
    alone = jax.jit(paged_attention, static_argnames=("kv_heads", "scale", "implementation"))
    apart = [alone(**each, implementation=implementation) for each in (own, others)]
    np.testing.assert_array_equal(out, np.concatenate([part.reshape(-1, *out.shape[1:]) for part, _ in apart]))
    np.testing.assert_array_equal(lse[0], apart[0][1][:, 0])
    np.testing.assert_array_equal(lse[1], apart[1][1])


@pytest.mark.parametrize(
    ("slots", "rows", "tiles", "message"),
    [
        (72, 8, 3, "72 slots are not 8 rows and as many queries for each of 3 tiles"),
        (8, 8, 1, "8 slots are not 8 rows"),
        (64, 0, 1, "64 slots are not 0 rows"),
        (24, 8, 1, "tiles of 16 queries.*1 or 64"),
    ],
)
def test_what_does_not_fit_is_refused(slots, rows, tiles, message):
    q, pool = jnp.zeros((slots, 2, 64), jnp.bfloat16), jnp.zeros((1, 2, PAGE, 256), jnp.bfloat16)
    sequences = lambda count: Sequences(jnp.zeros((count, 1), jnp.int32), *jnp.zeros((2, count), jnp.int32))
    options = dict(kv_heads=2, scale=1.0, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=message):
        mixed_paged_attention(q, pool, 0, sequences(rows), sequences(tiles), **options)


def test_arrays_of_different_lengths_are_refused():
    own, others = CASES["mixed"].make_apart(seed=3)
    others["positions"] = others["positions"][:2]
    with pytest.raises(ValueError, match="positions has 2 entries for 3 tiles"):
        mixed_paged_attention(**joined(own, others))
