"""The kernel of the window's attention gradient, in the interpreter and on a GPU, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import window_attention_grad
from pallas_kernels.window_attention_grad import work
from pallas_kernels.window_attention_grad.cases import PACKED, PAGE, Case
from tests.pallas_kernels.window_attention_grad.oracle import oracle

HALF_PADDING = Case("group of 7, half padding", 7, 1, 128, PACKED, 9, 6, 3)
CASES = (
    Case("group of 1, two heads", 2, 2, 128, PACKED, 9, 1, 2),
    Case("group of 2, keys before the window", 2, 1, 64, PACKED, 9, 2, 2),
    Case("group of 3, keys before the window", 3, 1, 128, (200,), 4, 2, 2),
    Case("group of 4, whole microbatch", 4, 1, 64, PACKED, 7, 0, 7),
    Case("group of 5, one block", 5, 1, 64, (1,), 1, 0, 1),
    Case("group of 6, last block", 6, 1, 128, (64, 70), 3, 2, 1),
    HALF_PADDING,
    Case("group of 8, first block", 8, 1, 64, (65,), 2, 0, 1),
    Case("float16", 2, 1, 64, (65,), 2, 0, 2, dtype="float16"),
)

ON_BOTH = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)

run = jax.jit(window_attention_grad, static_argnames=("kv_heads", "scale", "implementation"))


def assert_close(got, expected, arguments):
    """Weights and gradients of scores are rounded to the dtype of q before the second products (bfloat16: a relative
    error of 2**-9 both ways), and so is d_q; float32 sums are much closer."""
    before = (0.0, arguments["d_k"], arguments["d_v"])
    for result, wanted, sums in zip(got, expected, before, strict=True):
        part, wanted = np.asarray(result, np.float64) - sums, wanted - sums
        assert np.abs(part - wanted).max() <= 2.0**-7 * np.abs(wanted).max() + 1e-6
        assert np.linalg.norm(part - wanted) <= 2.0**-8 * np.linalg.norm(wanted) + 1e-6


@ON_BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_formula_in_float64(case, implementation, no_races):
    arguments = case.make(seed=1)
    d_q, d_k, d_v = run(**arguments, implementation=implementation)
    assert (d_q.dtype, d_k.dtype, d_v.dtype) == (case.dtype, jnp.float32, jnp.float32)
    assert_close((d_q, d_k, d_v), oracle(**arguments), arguments)


@ON_BOTH
def test_queries_without_cotangent_contribute_exactly_nothing(implementation, no_races):
    arguments = HALF_PADDING.make(seed=2)
    arguments["d_out"][10:50] = 0  # within a sequence; its other end and the last block are padding
    quiet = ~arguments["d_out"].any(axis=(1, 2))
    expected = oracle(**arguments)
    for name, value in (("out", np.nan), ("lse", np.nan), ("lse", -1e30)):
        arguments[name][quiet] = value
        got = run(**arguments, implementation=implementation)
        assert_close(got, expected, arguments)
        assert not np.any(np.asarray(got[0])[quiet])


@ON_BOTH
def test_sums_that_the_window_does_not_reach_stay(implementation, no_races):
    arguments = HALF_PADDING.make(seed=3)
    _, d_k, d_v = run(**arguments, implementation=implementation)
    reached = slice(5 * PAGE, 5 * PAGE + 65)  # the window sees the last sequence, of blocks 5 and 6, of 65 tokens
    for got, sums in ((np.array(d_k), arguments["d_k"]), (np.array(d_v), arguments["d_v"])):
        assert np.all(np.any(got[reached] != sums[reached], axis=(1, 2)))
        got[reached] = sums[reached]
        np.testing.assert_array_equal(got, sums)


@ON_BOTH
def test_a_window_of_padding_changes_nothing(implementation, no_races):
    arguments = Case("padding", 2, 1, 64, PACKED, 9, 7, 2).make(seed=4)
    d_q, d_k, d_v = run(**arguments, implementation=implementation)
    assert not np.any(np.asarray(d_q))
    np.testing.assert_array_equal(d_k, arguments["d_k"])
    np.testing.assert_array_equal(d_v, arguments["d_v"])


@ON_BOTH
def test_first_block_and_layer_are_data(implementation, no_races):
    arguments = Case("moving", 2, 1, 64, (65, 60), 3, 0, 1).make(seed=5, unused=0.0)
    compiled = run.lower(**arguments, implementation=implementation).compile()
    static = {name: arguments.pop(name) for name in ("kv_heads", "scale")}
    for first, layer in ((0, 0), (2, 1)):
        arguments |= {"first_block": np.int32(first), "layer": np.int32(layer)}
        assert_close(compiled(**arguments), oracle(**arguments, **static), arguments)


def test_items_are_pairs_of_blocks_longest_first():
    """The example of ``work.items``: a sequence in blocks 2 to 4, of which the window begins at block 3."""
    starts, tables = jnp.array([0, 0, 2, 2, 2, 5], jnp.int32), 10 + jnp.arange(6, dtype=jnp.int32)
    active = jnp.arange(3 * PAGE)[:, None] < 100
    items = np.asarray(work.items(active, tables, starts, jnp.int32(3)))
    columns = [work.BLOCK, work.FIRST_PAGE, work.SECOND_PAGE, work.LIMIT, work.FIRST_TILE, work.TILES, work.FIRST_QUERY]
    assert items[:2][:, columns].tolist() == [[2, 12, 13, 292, 0, 2, 3], [4, 14, 15, 292, 1, 1, 4]]
    assert not items[2:, work.TILES].any()
    assert sorted(items[:, work.BLOCK]) == list(range(6))


@pytest.mark.parametrize(
    ("head_size", "dtype", "message"),
    [
        (8, "bfloat16", "head size 8; the kernel takes 64 and 128"),
        (64, "float32", "q is float32, q float32; the kernel"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(head_size, dtype, message):
    arguments = Case("refused", 2, 1, head_size, (65,), 2, 0, 2, dtype=dtype).make(seed=0)
    with pytest.raises(ValueError, match=message):
        window_attention_grad(**arguments, implementation="mosaic_gpu")


def test_pages_of_another_size_are_refused():
    arguments = Case("refused", 2, 1, 64, (65,), 2, 0, 2).make(seed=0)
    pool = arguments["pool"]
    arguments["pool"] = pool.reshape(pool.shape[0], -1, 32, pool.shape[-1])
    arguments |= {"tables": np.arange(4, dtype=np.int32), "block_starts": np.zeros(4, np.int32)}
    with pytest.raises(ValueError, match="pages of 32 rows; the kernel takes 64"):
        window_attention_grad(**arguments, implementation="mosaic_gpu")
