"""The window's attention gradient against its formula in float64 loops, and against jax.grad of dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import window_attention_grad
from pallas_kernels.window_attention_grad.cases import SMALL, Case
from tests.pallas_kernels.window_attention_grad.oracle import oracle

PAGE = 64
LENGTHS = (130, 64, 1, 65)
BLOCK_STARTS = np.array([0, 0, 0, 3, 4, 5, 5, 7, 8], np.int32)
"""The sequences of LENGTHS take 3, 1, 1 and 2 blocks; two blocks of padding follow."""
BLOCKS = len(BLOCK_STARTS)


run = jax.jit(window_attention_grad, static_argnames=("kv_heads", "scale"))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_the_formula_in_float64(case):
    arguments = case.make(seed=1)
    d_q, d_k, d_v = run(**arguments)
    expected = oracle(**arguments)
    assert (d_q.dtype, d_k.dtype, d_v.dtype) == (case.dtype, jnp.float32, jnp.float32)
    # Products and sums are float32 (terms up to about 10); only d_q is rounded to the dtype of q.
    relative = 2.0**-8 if case.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(d_q, np.float64), expected[0], rtol=relative, atol=5e-5)
    np.testing.assert_allclose(d_k, expected[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(d_v, expected[2], rtol=1e-5, atol=1e-4)


@functools.partial(jax.jit, static_argnames="scale")
def packed_attention(q, k, v, sequence, scale):
    """Dense causal attention of a whole microbatch; ``sequence`` [slots] names the sequence of a slot, -1 for none."""
    slots = jnp.arange(len(sequence))
    seen = (slots[:, None] >= slots) & (sequence[:, None] == sequence)
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.where(seen[None], jnp.einsum("qhd,khd->hqk", q, k, precision="highest") * scale, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("hqk,khd->qhd", jnp.exp(scores - lse[..., None]), v, precision="highest"), lse.T


def sequence_of_slot():
    sequence = np.full(BLOCKS * PAGE, -1)
    for number, (first, length) in enumerate(zip((0, 3, 4, 5), LENGTHS, strict=True)):
        sequence[first * PAGE : first * PAGE + length] = number
    return sequence


@functools.cache
def microbatch(query_heads, kv_heads, head_size=8):
    """Arguments for whole-microbatch windows, with consistent out and lse, and the gradients jax.grad gives."""
    random = np.random.default_rng(query_heads)
    slots, scale, sequence = BLOCKS * PAGE, head_size**-0.5, sequence_of_slot()
    draw = lambda heads: random.standard_normal((slots, heads, head_size)).astype(np.float32)
    q, k, v, d_out = draw(query_heads), draw(kv_heads), draw(kv_heads), draw(query_heads)
    d_out[sequence < 0] = 0
    attention = functools.partial(packed_attention, sequence=sequence, scale=scale)
    (out, lse), pull_back = jax.vjp(attention, q, k, v)
    expected = pull_back((d_out, np.zeros_like(lse)))
    out, lse, expected = jax.device_get((out, lse, expected))
    tables = random.permutation(BLOCKS + 3)[:BLOCKS].astype(np.int32)
    pool = np.full((2, BLOCKS + 3, PAGE, 2 * kv_heads * head_size), np.nan, np.float32)
    rows = np.stack([k, v], axis=1).reshape(slots, -1)
    rows[sequence < 0] = np.nan
    pool[1, tables] = rows.reshape(BLOCKS, PAGE, -1)
    arguments = {"q": q, "out": out, "lse": lse, "d_out": d_out, "pool": pool, "layer": np.int32(1), "tables": tables}
    arguments |= {"block_starts": BLOCK_STARTS, "kv_heads": kv_heads, "scale": scale}
    return arguments, expected


def windows_last_to_first(arguments, window_blocks):
    """(d_q of the whole microbatch, d_k, d_v), one window at a time."""
    shape = (BLOCKS * PAGE, arguments["kv_heads"], arguments["q"].shape[-1])
    d_k = d_v = np.zeros(shape, np.float32)
    d_queries = []
    for first in reversed(range(0, BLOCKS, window_blocks)):
        part = slice(first * PAGE, (first + window_blocks) * PAGE)
        window = {name: arguments[name][part] for name in ("q", "out", "lse", "d_out")}
        sums = {"first_block": np.int32(first), "d_k": d_k, "d_v": d_v}
        d_q, d_k, d_v = run(**arguments | window | sums)
        d_queries.insert(0, d_q)
    return np.concatenate(d_queries), d_k, d_v


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(2, 2), (6, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize("window_blocks", [1, 3, 9])
def test_windows_sum_to_the_gradient_of_the_whole_microbatch(query_heads, kv_heads, window_blocks):
    arguments, expected = microbatch(query_heads, kv_heads)
    for got, want in zip(windows_last_to_first(arguments, window_blocks), expected, strict=True):
        # Both sides are float32 with sums over at most 130 keys and 7 * 130 queries.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=5e-5)


def test_rows_of_a_window_are_complete_once_it_is_done():
    arguments, (_, d_k, _) = microbatch(6, 2)
    late = {name: arguments[name][5 * PAGE :] for name in ("q", "out", "lse", "d_out")}
    sums = {"first_block": np.int32(5), "d_k": np.zeros_like(d_k), "d_v": np.zeros_like(d_k)}
    _, partial, _ = jax.device_get(run(**arguments | late | sums))
    np.testing.assert_allclose(partial[5 * PAGE :], d_k[5 * PAGE :], rtol=1e-4, atol=5e-5)
    assert not partial[: 5 * PAGE].any()  # other sequences are not touched


@pytest.mark.parametrize("lse", [-1e30, 0.0, 1e30])
def test_padding_contributes_exactly_nothing(lse):
    case = Case("padding", 4, 2, 8, LENGTHS, BLOCKS, 7, 2, dtype="float32")
    arguments = case.make(seed=3)
    arguments["lse"][:] = lse
    arguments["out"] *= 1e30
    d_q, d_k, d_v = run(**arguments)
    assert not np.any(np.asarray(d_q))
    np.testing.assert_array_equal(d_k, arguments["d_k"])
    np.testing.assert_array_equal(d_v, arguments["d_v"])


def test_unused_rows_do_not_matter():
    case = SMALL[2]
    results = [run(**case.make(seed=4, unused=unused)) for unused in (0.0, float("nan"), float("inf"))]
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


def test_first_block_and_layer_are_data():
    arguments, (expected, _, _) = microbatch(2, 2)
    static = {name: arguments[name] for name in ("kv_heads", "scale")}
    arguments = {name: value for name, value in arguments.items() if name not in static}
    sums = dict.fromkeys(("d_k", "d_v"), np.zeros((BLOCKS * PAGE, 2, 8), np.float32))
    traces = []

    @jax.jit
    def pull_back(**arrays):
        traces.append(1)
        return window_attention_grad(**arrays, **static)

    for first in (0, 4, 8):
        part = slice(first * PAGE, (first + 1) * PAGE)
        window = {name: arguments[name][part] for name in ("q", "out", "lse", "d_out")}
        d_q, _, _ = pull_back(**arguments | window | sums | {"first_block": np.int32(first)})
        np.testing.assert_allclose(d_q, expected[part], rtol=1e-4, atol=5e-5)
    assert len(traces) == 1


def test_sums_are_added_to_in_place():
    arguments = SMALL[1].make(seed=0)
    static = {name: arguments.pop(name) for name in ("kv_heads", "scale")}
    run_with_sums = lambda d_k, d_v, rest: window_attention_grad(d_k=d_k, d_v=d_v, **rest, **static)
    d_k, d_v = arguments.pop("d_k"), arguments.pop("d_v")
    compiled = jax.jit(run_with_sums, donate_argnums=(0, 1)).lower(d_k, d_v, arguments).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == d_k.nbytes + d_v.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": np.zeros((64, 4), np.float32)}, r"lse has shape \(64, 4\); q of \(64, 8, 8\) needs \(64, 8\)"),
        ({"kv_heads": 3}, "8 query heads are not a multiple of 3 K/V heads"),
        ({"kv_heads": 2}, "have 64 values; K and V of 2 heads of 8 need 32"),
        ({"block_starts": np.zeros(2, np.int32)}, "2 block starts for 3 blocks"),
        ({"d_v": np.zeros((192, 4, 8), np.float16)}, r"d_v is float16 \(192, 4, 8\); 3 blocks need float32"),
        ({"implementation": "fast"}, "no implementation 'fast'; it has mosaic_gpu, mosaic_gpu_interpreted, reference"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        window_attention_grad(**SMALL[0].make(seed=0) | change)


def test_a_window_that_is_no_multiple_of_the_page_is_refused():
    arguments = SMALL[0].make(seed=0)
    arguments |= {name: arguments[name][:60] for name in ("q", "out", "lse", "d_out")}
    with pytest.raises(ValueError, match="a window of 60 slots; it must be a multiple of the page of 64"):
        window_attention_grad(**arguments)
