"""The cases of ``flexjax bench kernels``: real shapes for a GPU, the same cases in miniature for a machine without."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexjax.bench.adapter_cases import expand_case, lora_grad_case
from flexjax.bench.attention_cases import chunk_case, decode_case, ragged, window_grad_case
from flexjax.bench.gated_cases import gated_case
from flexjax.bench.kernel_case import KernelCase
from flexjax.bench.row_cases import loss_case, page_case, parts_case, product_case, row_write_case
from pallas_kernels.gated_expand.cases import GATE, NEITHER
from pallas_kernels.gated_expand.cases import Case as GatedCase
from pallas_kernels.grouped_lora.cases import Case
from pallas_kernels.lora_expand.cases import EIGHT, EIGHT_ROWS_EACH, gate_up, qkv
from pallas_kernels.model_shapes import LLAMA_3_1_8B, STORIES_260K, ModelShape
from pallas_kernels.page_write.cases import LARGE_PARTS, PartsCase, layer


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    decode: (rows, context) that the decode metric is the worst of; few_rows: the same of the metric for few.
    chunks: (tokens, context); windows: (window, context).
    written, decode_written: rows of page writes; pool_bytes: at least so large is the pool they go to.
    parts: what a layer writes at a time.
    slots, rank: of LoRA gradients.
    loss: (tokens, chunk of the vocabulary).
    product_rows: rows of thin products.
    cold_bytes: what the calls of one program touch together, several times the L2 cache.
    workload_rows: decode rows whose contexts are drawn from a workload.
    """

    model: ModelShape
    decode: tuple[tuple[int, int], ...]
    few_rows: tuple[tuple[int, int], ...]
    chunks: tuple[tuple[int, int], ...]
    windows: tuple[tuple[int, int], ...]
    written: int
    decode_written: int
    pool_bytes: float
    parts: tuple[PartsCase, ...]
    slots: int
    rank: int
    loss: tuple[tuple[int, int], ...]
    product_rows: tuple[int, ...]
    cold_bytes: float
    workload_rows: int


FULL = Sizes(
    model=LLAMA_3_1_8B,
    decode=((64, 2048), (256, 1024)),
    few_rows=((4, 8192),),
    chunks=((2048, 2048), (8192, 8192), (512, 4096)),
    windows=((2048, 8192), (8192, 8192), (512, 4096)),
    written=2048,
    decode_written=64,
    pool_bytes=1.1e9,
    parts=tuple(case for case in LARGE_PARTS if LLAMA_3_1_8B.name in case.name),
    slots=2048,
    rank=16,
    loss=((512, 32768), (2048, 32768)),
    product_rows=(8, 64),
    cold_bytes=1e9,
    workload_rows=64,
)

TINY = Sizes(
    model=STORIES_260K,
    decode=((3, 130), (5, 70)),
    few_rows=((2, 200),),
    chunks=((64, 64), (128, 128), (64, 128)),
    windows=((64, 128), (128, 128)),
    written=64,
    decode_written=4,
    pool_bytes=1e6,
    parts=(layer(STORIES_260K, 4, 64, (STORIES_260K.hidden,), "keys, values and x"),),
    slots=64,
    rank=8,
    loss=((8, 128),),
    product_rows=(2,),
    cold_bytes=1e4,
    workload_rows=4,
)


def all_cases(sizes: Sizes, workloads: Path | None) -> list[KernelCase]:
    """Those of the metrics first."""
    model, cold = sizes.model, sizes.cold_bytes
    decode = (*sizes.decode, *sizes.few_rows)
    return [
        *(decode_case(f"decode {rows} x {context}", model, [context] * rows, cold) for rows, context in decode),
        *(chunk_case(f"chunk {tokens} of {context}", model, tokens, context) for tokens, context in sizes.chunks),
        *(window_grad_case(f"window_grad {w} of {c}", model, w, c) for w, c in sizes.windows),
        *writes(sizes),
        *lora_grads(sizes),
        *(
            decode_case(f"decode {rows} x {context} ragged", model, ragged(context, rows), cold)
            for rows, context in decode
        ),
        *(workload_decode(sizes, workloads) if workloads else ()),
        *(loss_case(f"loss {tokens} tokens", model, tokens, chunk) for tokens, chunk in sizes.loss),
        *fused_lora_grads(sizes),
        *part_writes(sizes),
        *lora_expansions(sizes),
        *expansions_onto_residuals(sizes),
        *gated_expansions(sizes),
        *products(sizes),
    ]


def writes(sizes: Sizes) -> list[KernelCase]:
    """As many rows as a window has, in whole pages and one by one; and those of decode rows."""
    arguments = (sizes.model, sizes.written, sizes.pool_bytes)
    return [
        page_case(f"page_write {sizes.written} rows in pages", *arguments),
        row_write_case(f"page_write {sizes.written} rows", *arguments),
        row_write_case(f"page_write {sizes.decode_written} rows", sizes.model, sizes.decode_written, sizes.pool_bytes),
    ]


def part_writes(sizes: Sizes) -> list[KernelCase]:
    """Of decode rows and a window together."""
    return [parts_case(case, sizes.cold_bytes / 4) for case in sizes.parts]


def workload_decode(sizes: Sizes, workloads: Path) -> list[KernelCase]:
    """Rows in the middle of their answers, as the requests of each recorded workload would stand."""
    cases = []
    for path in (workloads / "azure_r20.jsonl", workloads / "sharegpt_r20.jsonl"):
        requests = [json.loads(line) for line in path.read_text().splitlines()]
        random = np.random.default_rng(0)
        drawn = random.choice(len(requests), sizes.workload_rows)
        contexts = [requests[i]["p"] + random.integers(1, requests[i]["o"] + 1) for i in drawn]
        name = f"decode {sizes.workload_rows} rows of {path.stem}"
        cases.append(decode_case(name, sizes.model, [int(context) for context in contexts], sizes.cold_bytes))
    return cases


def lora_grads(sizes: Sizes) -> list[KernelCase]:
    """Every module alone, with the low-rank activations that the forward pass has; one without them."""
    alone = functools.partial(Case, "", sizes.slots, rank=sizes.rank)
    kept = {name: alone(*widths, keeps_h=True) for name, widths in modules(sizes.model).items()}
    kept["down_proj, h computed"] = alone(sizes.model.feed_forward, sizes.model.hidden)
    return [lora_grad_case(f"lora_grads {name}", case, sizes.cold_bytes) for name, case in kept.items()]


def fused_lora_grads(sizes: Sizes) -> list[KernelCase]:
    """The modules of a product together, added to the product's own cotangent of x."""
    d, ff = sizes.model.hidden, sizes.model.feed_forward
    together = functools.partial(Case, "", sizes.slots, rank=sizes.rank, keeps_h=True, has_base=True)
    products = {"qkv": (d, qkv(sizes.model)), "gate_up": (d, (ff, ff)), "down": (ff, (d,))}
    cases = {name: together(inputs, sum(widths), widths=widths) for name, (inputs, widths) in products.items()}
    return [lora_grad_case(f"lora_grads of {name}", case, sizes.cold_bytes) for name, case in cases.items()]


def lora_expansions(sizes: Sizes) -> list[KernelCase]:
    """Eight adapters in one batch of decode rows, and a window of one beside rows without."""
    widths, rows, window = gate_up(sizes.model), EIGHT_ROWS_EACH, ((0, 64), (3, sizes.slots))
    cases = {"gate_up, 64 rows": (widths, rows), f"gate_up, window of {sizes.slots}": (widths, window)}
    return [expand_case(f"lora_expand {name}", *of, sizes.cold_bytes / 4) for name, of in cases.items()]


def expansions_onto_residuals(sizes: Sizes) -> list[KernelCase]:
    """As o and down of rows, and of rows and a window: an adapter in every tile, and none."""
    rows, slots = EIGHT_ROWS_EACH, 64 + sizes.slots
    tiles = {"64 rows": rows, f"{slots} slots": (*rows, (3, sizes.slots))}
    cases = tiles | {f"{of}, no adapter": ((0, sum(count for _, count in runs)),) for of, runs in tiles.items()}
    expand = functools.partial(expand_case, widths=(sizes.model.hidden,), cold_bytes=sizes.cold_bytes / 4)
    return [expand(f"lora_expand onto a residual, {of}", tiles=runs, residual=True) for of, runs in cases.items()]


def gated_expansions(sizes: Sizes) -> list[KernelCase]:
    """The same slots; and the window once more for a tape that keeps gate."""
    width, rows, window = sizes.model.feed_forward, EIGHT_ROWS_EACH, ((0, 64), (3, sizes.slots))
    taped = NEITHER, *[GATE] * (sizes.slots // 64)
    kinds = {
        "64 rows": (rows,),
        f"window of {sizes.slots}": (window,),
        f"taped window of {sizes.slots}": (window, taped),
    }
    cases = {name: GatedCase(name, width, EIGHT, *of) for name, of in kinds.items()}
    return [gated_case(f"gated_expand, {name}", case, sizes.cold_bytes / 4) for name, case in cases.items()]


def modules(model: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the seven linear layers; those of equal shape stand together."""
    queries, keys = model.query_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "q_proj, o_proj": (model.hidden, queries),
        "k_proj, v_proj": (model.hidden, keys),
        "gate_proj, up_proj": (model.hidden, model.feed_forward),
        "down_proj": (model.feed_forward, model.hidden),
    }


def products(sizes: Sizes) -> list[KernelCase]:
    """The fused products of a layer for few rows."""
    model = sizes.model
    widths = {(model.hidden, model.hidden + model.row_width), (model.hidden, 2 * model.feed_forward)}
    widths |= {(model.hidden, model.hidden), (model.feed_forward, model.hidden)}
    return [product_case(rows, *width, sizes.cold_bytes) for rows in sizes.product_rows for width in sorted(widths)]
