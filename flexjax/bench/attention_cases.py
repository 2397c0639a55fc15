"""Cases of attention: decode rows, chunks of prompts, and the gradient of windows."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.bench.device_values import device_normal
from flexjax.bench.kernel_case import LEAST_CALLS, MOST_CALLS, Alternative, KernelCase
from flexjax.bench.timing import compiled
from pallas_kernels import paged_attention, window_attention_grad
from pallas_kernels.model_shapes import ModelShape
from pallas_kernels.paged_attention import api as attention_api
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.paged_attention.api import plan_paged_attention
from pallas_kernels.window_attention_grad import api as grad_api
from pallas_kernels.window_attention_grad import cases as grad_cases

PAGE = attention_cases.PAGE
cudnn_attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def decode_case(name: str, model: ModelShape, contexts: Sequence[int], cold_bytes: float) -> KernelCase:
    """Rows with contexts of these lengths, each computing its last token."""
    longest, rows = max(contexts), len(contexts)
    uniform = attention_cases.decode(model, rows, longest)
    case = replace(uniform, positions=tuple(int(context) - 1 for context in contexts))
    key_bytes = sum(contexts) * model.row_width * 2
    layers = max(2, min(MOST_CALLS, round(cold_bytes / key_bytes)))
    calls = max(layers, LEAST_CALLS)
    return KernelCase(
        name=name,
        operation="paged_attention",
        shape=f"{rows} rows, contexts {min(contexts)} to {longest}, {sum(contexts)} keys",
        bytes=key_bytes + query_bytes(model, rows),
        flops=4 * model.query_heads * model.head_size * sum(contexts),
        calls=calls,
        prepare=functools.partial(prepare_attention, case, calls, layers),
        call=functools.partial(attention_call, case),
        implementations=tuple(attention_api.IMPLEMENTATIONS),
        alternatives=decode_alternatives(longest == min(contexts)),
        beside_reference=False,
    )


def decode_alternatives(uniform: bool) -> dict[str, Alternative]:
    """The slower one is left out where it has most to gather for nothing."""
    cudnn = {"cudnn, keys in order": Alternative(cudnn_decode, keys_in_order, on_gpu_only=True)}
    return ({"xla, gathered": Alternative(gathered_decode)} if uniform else {}) | cudnn


def chunk_case(name: str, model: ModelShape, tokens: int, context: int) -> KernelCase:
    """The last ``tokens`` tokens of a sequence of ``context``; cuDNN can do the whole sequence only."""
    case = attention_cases.chunk(model, tokens, context)
    alternatives = {"cudnn": Alternative(cudnn_chunk, keys_in_order, on_gpu_only=True)} if tokens == context else {}
    calls = 8 if tokens <= 2048 else 2
    return KernelCase(
        name=name,
        operation="paged_attention",
        shape=f"{tokens} tokens, the last of {context}",
        bytes=context * model.row_width * 2 + query_bytes(model, tokens),
        flops=4 * model.query_heads * model.head_size * causal_pairs(tokens, context),
        calls=calls,
        prepare=functools.partial(prepare_attention, case, calls, calls),
        call=functools.partial(attention_call, case),
        implementations=tuple(attention_api.IMPLEMENTATIONS),
        alternatives=alternatives,
        beside_reference=tokens != context,
    )


def window_grad_case(name: str, model: ModelShape, window: int, context: int) -> KernelCase:
    """The last ``window`` tokens of one sequence of ``context`` tokens."""
    case = grad_cases.last_window(model, window, context)
    if window == context:
        alternatives = {"cudnn": Alternative(pull_back, whole_residuals, comparable=False, on_gpu_only=True)}
    else:
        alternatives = {
            "cudnn, two calls": Alternative(pull_back, two_residuals, comparable=False, on_gpu_only=True),
        }
    calls = 4 if window <= 2048 else 2
    return KernelCase(
        name=name,
        operation="window_attention_grad",
        shape=f"{window} tokens, the last of {context}",
        bytes=context * model.row_width * (2 + 4 + 4) + 2 * query_bytes(model, window),
        flops=10 * model.query_heads * model.head_size * causal_pairs(window, context),
        calls=calls,
        prepare=functools.partial(prepare_window, case, calls),
        call=functools.partial(window_call, case),
        implementations=tuple(grad_api.IMPLEMENTATIONS),
        alternatives=alternatives,
        beside_reference=context <= 4096,
    )


def causal_pairs(tokens: int, context: int) -> int:
    """Pairs of a query and a key it sees, for the last ``tokens`` of ``context``."""
    return tokens * (context - tokens) + tokens * (tokens + 1) // 2


def query_bytes(model: ModelShape, tokens: int) -> int:
    """q and out in 16 bits, log-sum-exp in 32."""
    return tokens * model.query_heads * (2 * model.head_size * 2 + 4)


def ragged(total_of_each: int, rows: int, seed: int = 0) -> list[int]:
    """Lengths from an eighth to almost twice the mean, the mean kept."""
    shares = np.random.default_rng(seed).permutation(np.linspace(1 / 8, 15 / 8, rows))
    return [max(1, round(share * total_of_each)) for share in shares]


def prepare_attention(case: attention_cases.Case, calls: int, layers: int, implementation: str):
    """Page tables as the case has them, values made on the device; queries of its own for every call, which take the
    layers of the pool in turn. The plan is made before the clock runs, since all layers of a step share one."""
    made = replace(case, query_heads=1, kv_heads=1, head_size=1).make(seed=0)
    tables, positions, lengths = (jnp.asarray(made[name]) for name in ("tables", "positions", "lengths"))
    given = {"tables": tables, "positions": positions, "lengths": lengths}
    shape = (len(tables), case.queries, case.query_heads, case.head_size)
    given["q"] = [device_normal(seed, shape, case.dtype) for seed in range(calls)]
    given["pool"] = pool_of(layers, made["pool"].shape[1], case)
    return (), given | {"plan": plan_of(case, implementation)(positions, lengths)}


def pool_of(layers: int, pages: int, case) -> jax.Array:
    return device_normal(2, (layers, pages, PAGE, 2 * case.kv_heads * case.head_size), case.dtype)


def plan_of(case: attention_cases.Case, implementation: str):
    sizes = dict(query_heads=case.query_heads, kv_heads=case.kv_heads, head_size=case.head_size)
    return functools.partial(plan_paged_attention, queries=case.queries, **sizes, implementation=implementation)


def attention_call(case: attention_cases.Case, implementation: str):
    run = compiled(paged_attention, kv_heads=case.kv_heads, scale=case.head_size**-0.5, implementation=implementation)

    def call(state, given, index):
        rows = given["tables"], given["positions"], given["lengths"]
        layer = np.int32(index % len(given["pool"]))
        out, _ = run(given["q"][index], given["pool"], layer, *rows, plan=given["plan"])
        return state, out

    return call


def keys_and_values(pool, tables, head_size: int):
    """K and V [tiles, keys, kv_heads, head_size] of pages [pages, page, width] in the order of the tables."""
    rows = pool.at[tables].get(mode="clip")
    rows = rows.reshape(tables.shape[0], -1, 2, pool.shape[-1] // (2 * head_size), head_size)
    return rows[:, :, 0], rows[:, :, 1]


def gathered_decode(state, given, index):
    """Pages gathered, then plain products with float32 sums."""
    q, pool = given["q"][index][:, 0], given["pool"]
    rows, heads, size = q.shape
    k, v = keys_and_values(pool[index % len(pool)], given["tables"], size)
    q = q.reshape(rows, k.shape[2], -1, size)
    scores = jnp.einsum("rhgd,rkhd->rhgk", q, k, preferred_element_type=jnp.float32) * size**-0.5
    seen = jnp.arange(k.shape[1]) <= given["positions"][:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(q.dtype)
    out = jnp.einsum("rhgk,rkhd->rhgd", weights, v, preferred_element_type=jnp.float32)
    return state, out.reshape(rows, 1, heads, size).astype(q.dtype)


def keys_in_order(state, given):
    """K and V of every layer out of their pages, as no engine with pages has them."""
    _, queries, _, size = given["q"][0].shape
    lengths = given["positions"] + given["lengths"]
    tables = given["tables"] if queries == 1 else given["tables"][:1]  # tiles of a chunk share one table
    ordered = [keys_and_values(layer, tables, size) for layer in given["pool"]]
    return {"q": given["q"], "ordered": ordered, "lengths": lengths}


def cudnn_decode(state, given, index):
    k, v = given["ordered"][index % len(given["ordered"])]
    return state, cudnn_attention(given["q"][index], k, v, key_value_seq_lengths=given["lengths"])


def cudnn_chunk(state, given, index):
    (k, v), q = given["ordered"][index], given["q"][index]
    out = cudnn_attention(q.reshape(1, -1, *q.shape[2:]), k, v, is_causal=True)
    return state, out.reshape(q.shape)


QUERIES = ("q", "out", "lse", "d_out")
BLOCKS = ("tables", "block_starts", "first_block")


def prepare_window(case: grad_cases.Case, layers: int, implementation: str):
    made = replace(case, query_heads=1, kv_heads=1, head_size=1).make(seed=0)
    given = {name: jnp.asarray(made[name]) for name in BLOCKS}
    tokens, heads = len(made["q"]), case.query_heads
    shape = (tokens, heads, case.head_size)
    given |= {name: device_normal(seed, shape, case.dtype) for seed, name in enumerate(("q", "out", "d_out"), 3)}
    given["lse"] = jnp.repeat(jnp.asarray(made["lse"]), heads, axis=1)
    given["pool"] = pool_of(layers, made["pool"].shape[1], case)
    sums = (case.blocks * PAGE, case.kv_heads, case.head_size)
    return (device_normal(6, sums, "float32"), device_normal(7, sums, "float32")), given


def window_call(case: grad_cases.Case, implementation: str):
    run = compiled(
        window_attention_grad, kv_heads=case.kv_heads, scale=case.head_size**-0.5, implementation=implementation
    )

    def call(state, given, index):
        queries, blocks = (given[name] for name in QUERIES), (given[name] for name in BLOCKS)
        d_q, d_k, d_v = run(*queries, given["pool"], np.int32(index), *blocks, *state)
        return (d_k, d_v), d_q

    return call


def residuals_of(q, k, v, causal: bool):
    """What cuDNN's backward needs of its forward, as a function of the cotangent that jax can pass around."""
    return jax.vjp(lambda q, k, v: cudnn_attention(q, k, v, is_causal=causal), q, k, v)[1]


def whole_residuals(state, given):
    """Of the whole sequence, causal; per layer."""
    ordered = [keys_and_values(layer, given["tables"][None], given["q"].shape[-1]) for layer in given["pool"]]
    return [[residuals_of(given["q"][None], k, v, causal=True)] for k, v in ordered], given["d_out"][None]


def two_residuals(state, given):
    """Of the window on the keys before it, unmasked, and on its own keys, causal: added up they are the window's
    gradient (cuDNN's causal mask begins at the first key, so that one call cannot do it)."""
    window, size = given["q"].shape[0], given["q"].shape[-1]
    pulls = []
    for layer in given["pool"]:
        k, v = keys_and_values(layer, given["tables"][None], size)
        before = residuals_of(given["q"][None], k[:, :-window], v[:, :-window], causal=False)
        pulls.append([before, residuals_of(given["q"][None], k[:, -window:], v[:, -window:], causal=True)])
    return pulls, given["d_out"][None]


def pull_back(state, given, index):
    """Only the backward: the residuals are arguments."""
    pulls, d_out = given
    return state, [pull(d_out) for pull in pulls[index]]
