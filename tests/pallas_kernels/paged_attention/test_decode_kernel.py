"""The decode kernel of paged attention, in the interpreter and on a GPU, against a dense softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.api import paged_attention, plan_paged_attention
from pallas_kernels.paged_attention.cases import ALONE, EDGES, Case
from pallas_kernels.paged_attention.plan import plan_decode
from tests.pallas_kernels.paged_attention.oracle import ON_BOTH, PAGE, assert_close, dense

CASES = (
    Case("edges of pages, group of 3", 9, 3, 64, 1, EDGES, ALONE, 4, layers=3),
    Case("one long row, group of 4", 8, 2, 128, 1, (700,), (1,), 11),
    Case("long, short and empty rows, group of 7", 7, 1, 128, 1, (3, 700, 0, 64, 5), (1, 1, 0, 1, 0), 12),
    Case("more rows than workers, group of 1", 1, 1, 64, 1, (130, 5, 64, 63, 0, 200, 127, 1, 9), (1,) * 9, 4),
    Case("group of 8", 16, 2, 64, 1, (70, 300), (1, 1), 6),
    Case("every row inactive", 4, 2, 64, 1, (0, 64), (0, 0), 3),
)


@functools.partial(jax.jit, static_argnames=("kv_heads", "scale", "implementation", "planned"))
def run(q, pool, layer, tables, positions, lengths, *, kv_heads, scale, implementation, planned=True):
    sizes = {"queries": 1, "query_heads": q.shape[2], "kv_heads": kv_heads, "head_size": q.shape[3]}
    plan = plan_paged_attention(positions, lengths, implementation=implementation, **sizes) if planned else None
    options = {"kv_heads": kv_heads, "scale": scale, "implementation": implementation, "plan": plan}
    return paged_attention(q, pool, layer, tables, positions, lengths, **options)


@ON_BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_softmax_in_float64(case, implementation, no_races):
    arguments = case.make(seed=1)
    out, lse = run(**arguments, implementation=implementation)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    assert_close((out, lse), dense(**arguments))
    inactive = np.array(case.lengths) == 0
    assert not np.any(np.asarray(out)[inactive]) and not np.any(np.asarray(lse)[inactive])


@ON_BOTH
def test_without_a_plan_and_for_queries_of_inactive_rows_that_are_not_finite(implementation, no_races):
    arguments = CASES[2].make(seed=2)
    expected = dense(**arguments)
    arguments["q"][np.array(CASES[2].lengths) == 0] = np.nan
    assert_close(run(**arguments, implementation=implementation, planned=False), expected)


@ON_BOTH
def test_unused_rows_do_not_matter(implementation, no_races):
    results = [
        run(**CASES[1].make(seed=3, unused=unused), implementation=implementation) for unused in (0.0, float("nan"))
    ]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("workers", [1, 7, 400])
def test_a_plan_covers_every_block_once_and_chains_join_what_was_cut(workers):
    random = np.random.default_rng(workers)
    positions, lengths, kv_heads = random.integers(0, 500, 9), random.integers(0, 2, 9), 3
    blocks = np.where(lengths, positions // PAGE + 1, 0)
    plan = plan_decode(jnp.array(positions), jnp.array(lengths), kv_heads=kv_heads, workers=workers)
    plan = jax.tree.map(np.asarray, plan)
    pairs = [(row, head) for row, _ in plan.active for head in range(kv_heads)]
    seen, holders = [], {}
    for (place, head, block, units, pieces), chain in zip(plan.work, plan.chains, strict=True):
        for pair in pairs[place * kv_heads + head :][:pieces]:
            count = min(units, blocks[pair[0]] - block)
            seen += [(*pair, block + i) for i in range(count)]
            holders.setdefault(pair, []).append(chain)
            units, block = units - count, 0
        assert units == 0
    assert seen == [(row, head, i) for row in range(9) for head in range(kv_heads) for i in range(blocks[row])]
    assert np.ptp(plan.work[:, 3]) <= 1
    for pair, chains in holders.items():
        *others, (row, head, place, begins, _) = chains
        assert len(chains) == 1 or (row, head) == pair
        assert begins == place - len(others) if others else begins == place or (row, head) != pair
        assert [chain[2] for chain in others] == list(range(place - len(others), place))
        assert all(chain[4] == place for chain in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_heads": 18}, "18 query heads share 2 K/V heads.*at most 8"),
        ({"head_size": 32}, "head size 32.*64 or 128"),
        ({"dtype": "float32"}, "q is float32.*bfloat16"),
        ({"queries": 16}, "tiles of 16 queries.*1 or 64"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, message):
    sizes = {"query_heads": 4, "kv_heads": 2, "head_size": 64, "queries": 1} | change
    case = Case("refused", positions=(5,), lengths=(1,), pages_per_sequence=1, **sizes)
    with pytest.raises(ValueError, match=message):
        paged_attention(**case.make(seed=0), implementation="mosaic_gpu")
