"""The calls that are compiled for an H100: every operation's cases for timing, as shapes; nothing is allocated."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    Sequences,
    gated_expand,
    grouped_lora_grad,
    lora_expand,
    mixed_paged_attention,
    page_write,
    paged_attention,
    window_attention_grad,
)
from pallas_kernels.gated_expand import cases as gated_cases
from pallas_kernels.grouped_lora import cases as lora_cases
from pallas_kernels.lora_expand import cases as expand_cases
from pallas_kernels.lora_expand.api import RANK_UNIT
from pallas_kernels.page_write import cases as write_cases
from pallas_kernels.page_write.api import write_pages, write_parts
from pallas_kernels.page_write.parts import Pages, Rows
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.window_attention_grad import cases as grad_cases

IMPLEMENTATION = "mosaic_gpu"
PAGE = 64
SCALAR = jax.ShapeDtypeStruct((), jnp.int32)

shaped = jax.ShapeDtypeStruct
words = lambda *shape: shaped(shape, jnp.int32)
floats = lambda *shape: shaped(shape, jnp.float32)


@dataclass(frozen=True)
class KernelCall:
    """Attributes:
    in_place: positions of the arguments that are donated and written in place.
    temporaries: bytes that it may take besides, where that is promised.
    """

    name: str
    function: Callable
    arguments: tuple
    in_place: tuple[int, ...] = ()
    temporaries: float = math.inf

    def __str__(self) -> str:
        return self.name


def attention(case: attention_cases.Case) -> KernelCall:
    tiles, heads = len(case.positions), case.kv_heads
    pages = 1 if case.one_sequence else tiles
    pool = (case.layers, pages * case.pages_per_sequence, PAGE, 2 * heads * case.head_size)
    arguments = (
        shaped((tiles, case.queries, case.query_heads, case.head_size), case.dtype),
        shaped(pool, case.dtype),
        SCALAR,
        words(tiles, case.pages_per_sequence),
        words(tiles),
        words(tiles),
    )
    options = dict(kv_heads=heads, scale=case.head_size**-0.5, implementation=IMPLEMENTATION)
    return KernelCall(case.name, functools.partial(paged_attention, **options), arguments)


def mixed_attention(case: attention_cases.MixedCase) -> KernelCall:
    """Without a copy of q or of the result, which are larger than what the temporaries may take."""
    row_call, tile_call = attention(case.rows), attention(case.tiles)
    q, pool, layer, *rows = row_call.arguments
    slots = q.shape[0] + tile_call.arguments[0].shape[0] * PAGE
    arguments = (shaped((slots, *q.shape[2:]), q.dtype), pool, layer, rows, tile_call.arguments[3:])
    options = dict(kv_heads=case.rows.kv_heads, scale=case.rows.head_size**-0.5, implementation=IMPLEMENTATION)

    def attend(q, pool, layer, rows, tiles):
        return mixed_paged_attention(q, pool, layer, Sequences(*rows), Sequences(*tiles), **options)

    return KernelCall(case.name, attend, arguments, temporaries=4e6)


def window_grad(case: grad_cases.Case) -> KernelCall:
    tokens, heads, size = case.window_blocks * PAGE, case.kv_heads, case.head_size
    queries = shaped((tokens, case.query_heads, size), case.dtype)
    sums = floats(case.blocks * PAGE, heads, size)
    arguments = (
        *(queries, queries, floats(tokens, case.query_heads), queries),
        *(shaped((case.layers, case.blocks, PAGE, 2 * heads * size), case.dtype), SCALAR),
        *(words(case.blocks), words(case.blocks), SCALAR, sums, sums),
    )
    options = dict(kv_heads=heads, scale=size**-0.5, implementation=IMPLEMENTATION)
    return KernelCall(case.name, functools.partial(window_attention_grad, **options), arguments, (9, 10))


def row_write(case: write_cases.Case) -> KernelCall:
    pool = shaped((case.layers, case.pages, PAGE, case.width), case.dtype)
    arguments = (pool, SCALAR, shaped((case.rows, case.width), case.dtype), words(case.rows))
    write = functools.partial(page_write, implementation=IMPLEMENTATION)
    return KernelCall(case.name, write, arguments, in_place=(0,), temporaries=1e6)


def page_writes(case: write_cases.PagesCase) -> KernelCall:
    pool = shaped((case.layers, case.pages, PAGE, case.width), case.dtype)
    values = shaped((case.first_row + case.tiles * PAGE, case.columns), case.dtype)
    arguments = (pool, SCALAR, values, words(case.tiles, -(-case.columns // case.width)))
    write = functools.partial(write_pages, first_row=case.first_row, implementation=IMPLEMENTATION)
    return KernelCall(f"pages, {case.name}", write, arguments, in_place=(0,), temporaries=1e6)


def part_writes(case: write_cases.PartsCase) -> KernelCall:
    matrix = lambda columns: shaped((case.rows + case.tiles * PAGE, columns), case.dtype)
    table = lambda columns: words(case.tiles, -(-columns // case.width))
    parts = [Pages(matrix(each), table(each), case.rows) for each in (case.width, *case.columns)]
    pool = shaped((case.layers, case.pages, PAGE, case.width), case.dtype)
    arguments = (pool, SCALAR, [Rows(matrix(case.width), words(case.rows)), *parts])
    write = functools.partial(write_parts, implementation=IMPLEMENTATION)
    return KernelCall(f"parts, {case.name}", write, arguments, in_place=(0,), temporaries=1e6)


def expansion(case: expand_cases.Case) -> KernelCall:
    slots, out = sum(count for _, count in case.tiles), sum(case.widths)
    rank = len(case.owner) * RANK_UNIT
    arguments = (
        shaped((slots, out), case.dtype),
        floats(slots, len(case.widths) * rank),
        shaped((case.layers, rank, out), case.dtype),
        *(SCALAR, words(slots), words(len(case.owner)), floats(max(case.owner) + 1)),
    )
    expand = functools.partial(lora_expand, widths=case.widths, implementation=IMPLEMENTATION)
    return KernelCall(f"expand {case.name}", expand, arguments, in_place=(0,))


def expansion_onto(case: expand_cases.Case) -> KernelCall:
    """With a residual, low behind y, as a step without dropout calls it."""
    slots, out, rank = sum(count for _, count in case.tiles), sum(case.widths), len(case.owner) * RANK_UNIT
    arguments = (
        *(shaped((slots, out + len(case.widths) * rank), case.dtype), shaped((case.layers, rank, out), case.dtype)),
        *(SCALAR, words(slots), words(len(case.owner)), floats(max(case.owner) + 1), shaped((slots, out), case.dtype)),
    )

    def expand(y, b, layer, indices, owner, scale, residual):
        adapters = indices, owner, scale
        options = dict(widths=case.widths, residual=residual, implementation=IMPLEMENTATION)
        return lora_expand(y, None, b, layer, *adapters, **options)

    return KernelCall(f"expand onto a residual {case.name}", expand, arguments)


def gated_expansion(case: gated_cases.Case, low_behind: bool = True) -> KernelCall:
    """With low behind y, as a step without dropout calls it, or of its own in float32."""
    slots, out, rank = sum(count for _, count in case.tiles), 2 * case.width, len(case.owner) * RANK_UNIT
    arguments = (
        shaped((slots, out + 2 * rank if low_behind else out), case.dtype),
        None if low_behind else floats(slots, 2 * rank),
        shaped((case.layers, rank, out), case.dtype),
        *(SCALAR, words(slots), words(len(case.owner)), floats(max(case.owner) + 1)),
        words(*np.shape(case.kept)) if case.kept else None,
    )
    expand = functools.partial(gated_expand, implementation=IMPLEMENTATION)
    name = f"gated {case.name}" + ("" if low_behind else ", low of its own")
    return KernelCall(name, expand, arguments, in_place=(0,) if case.kept else ())


def lora_gradients(case: lora_cases.Case) -> KernelCall:
    widths = case.widths or (case.outputs,)
    ranks = len(widths) * case.rank
    x = shaped((case.slots, case.inputs), case.dtype)
    h = shaped((case.slots, ranks), case.dtype) if case.keeps_h else None
    arguments = (
        *(x, shaped((case.slots, case.outputs), case.dtype)),
        *(shaped((case.inputs, ranks), case.dtype), shaped((case.rank, case.outputs), case.dtype), floats()),
        *(h, x if case.has_base else None),
    )

    def gradients(x, d_y, a, b, scale, h, base):
        return grouped_lora_grad(x, d_y, a, b, scale, widths=widths, h=h, d_x_base=base, implementation=IMPLEMENTATION)

    return KernelCall(f"gradients {case.name}", gradients, arguments, in_place=(6,) if case.has_base else ())


CALLS = (
    *map(attention, attention_cases.LARGE),
    *map(mixed_attention, attention_cases.LARGE_MIXED),
    *map(window_grad, grad_cases.LARGE),
    *map(row_write, write_cases.LARGE),
    *map(page_writes, write_cases.LARGE_PAGES),
    *map(part_writes, write_cases.LARGE_PARTS),
    *map(expansion, expand_cases.LARGE),
    *(expansion_onto(case) for case in expand_cases.LARGE if case.name.startswith("down")),
    *map(gated_expansion, gated_cases.LARGE),
    *(gated_expansion(case, low_behind=False) for case in gated_cases.LARGE),
    *map(lora_gradients, lora_cases.LARGE),
)
