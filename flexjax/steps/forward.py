"""The forward step: one pass of every slot through the decoder, requests and finetuning windows alike.

    (weights, adapters, pool, rows, packed batch) -> (pool, rows, logits of the rows that sample)

A plain function; `flexjax.engine.programs` compiles it. Layout and dimensions are static.
"""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.models.build import dotted
from flexjax.models.decoder import Decoder, DecoderLayer
from flexjax.models.dropout import Dropout
from flexjax.models.layers import rotary_frequencies, rotation_of
from flexjax.models.lora import PRODUCTS, no_adapter
from flexjax.models.matrices import rows_behind
from flexjax.models.resident_adapters import ResidentAdapters
from flexjax.request import MAX_LOGPROBS
from flexjax.state import LSE, AdapterStack, Dimensions, RowState
from flexjax.step_batch import forward_fields, unpack
from flexjax.steps import tape
from flexjax.steps.attention import attend, places_of, token_positions, write_keys_values
from flexjax.steps.kernels import Kernels
from flexjax.steps.sampling import prompt_logprobs
from pallas_kernels import plan_lora_expand, write_pages, write_parts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardOutput:
    """What a forward step leaves for the sampling step and for the host.

    Attributes:
        logits: [rows, vocabulary] float32 of the slots that rows sample from.
        prompt_logprobs: per chunk slot, for the token after it: (its own [chunk], ids [chunk, 20], values [chunk, 20]),
            only with ``prompt_logprobs``.
    """

    logits: jax.Array
    prompt_logprobs: tuple | None = None


def forward(
    definition: nnx.GraphDef,
    dims: Dimensions,
    layout: SlotLayout,
    kernels: Kernels,
    weights: nnx.State,
    adapters: AdapterStack,
    pool: jax.Array,
    rows: RowState,
    packed: jax.Array,
) -> tuple[jax.Array, RowState, ForwardOutput]:
    """One step. pool [layers, pages, 64, row], packed as `forward_fields` says; pool and rows are written."""
    batch = unpack(packed, forward_fields(dims, layout))
    model = nnx.merge(definition, weights)
    tokens = rows.last_token[: layout.rows]
    tokens = jnp.concatenate([tokens, batch.tokens]) if layout.chunk else tokens
    with jax.named_scope("layers"):
        x, pool, lse = run_layers(model, dims, layout, kernels, adapters, pool, model.embedded(tokens), batch)
    if layout.tape:
        final, first_row = tape.local_part(x, "x", dims.tp), layout.rows
        if lse is not None:
            final = jnp.concatenate([final[first_row:], tape.pack_lse(lse, final.dtype)], axis=-1)
            first_row = 0
        pool = write_final(pool, dims, final, batch.final_place, first_row, kernels)
    with jax.named_scope("head"):
        logits = model.logits(x[jnp.maximum(batch.sample_slot, 0)])
        prompts = chunk_logprobs(model, x[layout.rows :], batch) if layout.prompt_logprobs else None
    rows = RowState(last_token=rows.last_token, history=record_chunk(rows.history, layout, batch))
    return pool, rows, ForwardOutput(logits, prompts)


def run_layers(model: Decoder, dims, layout, kernels, adapters, pool, x, batch):
    """The loop over stacked layers; the pool rides in the carry, so that it is updated in place, and the number of the
    layer, so that XLA reads its weights where they lie: at any other index it copies them. Also returns every layer's
    log-sum-exp, [layers, chunk, Hq] float32, if it is kept behind the final hidden state."""
    definition, stacked = model.layer_stack()
    rotation = rotation_of(token_positions(batch, layout), rotary_frequencies(model.config))
    places = places_of(batch, layout, model.layers, kernels)
    if layout.tape:
        width = dims.model.intermediate_size // dims.tp
        tables = tape.write_tables(dims.tape_layout, batch.tape_pages, width, pool.shape[-1])
        places = replace(places, tape=tables)
    adapter_index = per_slot(batch.row_adapter, batch.tile_adapter if layout.chunk else None)
    owner = dict(zip(PRODUCTS, batch.owner, strict=True))
    planned = functools.partial(plan_lora_expand, implementation=kernels.lora_expand)
    plan = {} if layout.base_only else {name: planned(adapter_index, owner[name], batch.scale) for name in owner}
    left_out = dims.rank_capacity if layout.base_only or layout.dropout else 0
    kept = tape.gated_tiles(dims.tape_layout, batch.tape_pages, layout.rows) if layout.tape else None
    lse_kept = layout.tape and "attention" in dims.tape and dims.lse_follows_final

    def one_layer(carry, _):
        x, pool, index = carry
        layer = nnx.merge(definition, layer_of(stacked, index, left_out))
        dropout = slot_dropout(layout, batch, index, dims.tp)
        a = dropout and {name: rows_of_a(name, adapters.a[name], index, dims.rank_capacity) for name in PRODUCTS}
        owners = adapter_index, owner, batch.scale
        gated = dict(gated_implementation=kernels.gated_expand, kept=kept)
        resident = ResidentAdapters(adapters.b, index, *owners, kernels.lora_expand, plan, dropout, a, **gated)
        adapter = no_adapter if layout.base_only else resident
        x, pool, lse = layer_forward(layer, dims, layout, kernels, adapter, pool, x, index, rotation, places, batch)
        return (x, pool, index + 1), lse if lse_kept else None

    (x, pool, _), lse = jax.lax.scan(one_layer, (x, pool, jnp.int32(0)), length=dims.model.num_layers)
    return x, pool, lse


def layer_of(stacked: nnx.State, index: jax.Array, left_out: int) -> nnx.State:
    """One layer's weights; the matrices of products without ``left_out`` of their last rows for every module."""

    def taken(path, leaf):
        behind = rows_behind(name, left_out) if (name := dotted(path)) in PRODUCTS else 0
        return entry_of(leaf, index, 0, leaf.shape[1] - behind)

    return jax.tree_util.tree_map_with_path(taken, stacked)


def rows_of_a(product: str, matrices: jax.Array, index: jax.Array, rank: int) -> jax.Array:
    """A of a product's modules in one layer, [modules * R, in]."""
    rows = rows_behind(product, rank)
    return entry_of(matrices, index, matrices.shape[1] - rows, rows)


def entry_of(stacked: jax.Array, index: jax.Array, first: int, rows: int) -> jax.Array:
    """Rows of one entry of the first axis; no check for negative indices, behind which XLA would not see the counter of
    a loop."""
    start, sizes = (index, first, *[0] * (stacked.ndim - 2)), (1, rows, *stacked.shape[2:])
    return jax.lax.dynamic_slice(stacked, start, sizes, allow_negative_indices=False)[0]


def layer_forward(layer: DecoderLayer, dims, layout, kernels, adapter, pool, x, index, rotation, places, batch):
    """One layer: stages, with attention between two writes of pages, the later one if there is a tape."""
    flat = lambda heads: heads.reshape(layout.slots, -1)
    options = dict(first_row=layout.rows, row=pool.shape[-1], tp=dims.tp)
    q, k, v = layer.qkv_stage(x, rotation, adapter)
    early = tape.parts(places.tape, dict(x=x, q=flat(q)), **options) if layout.tape else []
    pool = write_keys_values(pool, index, places, k, v, early, kernels)
    attention, lse = attend(layer, q, pool, index, batch, places, layout, kernels)
    if layout.tape:  # a write that could come before or after attention's reads would make XLA copy the pool
        pool, attention, lse = jax.lax.optimization_barrier((pool, attention, lse))
    mid = layer.output_stage(x, attention, adapter)
    h, gate_up = layer.gated_stage(mid, adapter)
    if layout.tape:
        kept = tape.parts(places.tape, {"attention": flat(attention), "mid": mid}, **options)
        kept += tape.parts(places.tape, {LSE: tape.pack_lse(lse[None], x.dtype)}, **options | {"first_row": 0})
        kept += tape.gate_up_parts(places.tape, gate_up, h.shape[1], **options)
        pool = write_parts(pool, index, kept, implementation=kernels.page_write)
    return layer.down_stage(mid, h, adapter), pool, lse


def per_slot(rows: jax.Array, tiles: jax.Array | None) -> jax.Array:
    """[rows] and [tiles] -> [slots]."""
    return rows if tiles is None else jnp.concatenate([rows, jnp.repeat(tiles, PAGE_TOKENS)])


def slot_dropout(layout: SlotLayout, batch: SimpleNamespace, layer: jax.Array, tp: int) -> Dropout | None:
    if not layout.dropout:
        return None
    seeds = tile_seeds(batch.dropout_seed)
    no_rows = jnp.zeros(layout.rows, jnp.uint32)
    rate = per_slot(jnp.zeros(layout.rows, jnp.float32), batch.dropout_rate)
    return Dropout(jnp.concatenate([no_rows, seeds]), rate, layer, tp)


def tile_seeds(seeds: jax.Array) -> jax.Array:
    """One dropout seed per token from one per tile: seeds [tiles] uint32 -> [tiles * 64]."""
    return (seeds[:, None] + jnp.arange(PAGE_TOKENS, dtype=jnp.uint32)).reshape(-1)


def write_final(pool, dims: Dimensions, x, places, first_row: int, kernels: Kernels):
    """The last layer's output of finetuning windows, and what lies behind it: 64 tokens take `Dimensions.final_rows`
    layers of a page, the pages that follow in a pool of one layer."""
    rows = -(-x.shape[-1] // pool.shape[-1])
    if rows > len(pool):
        raise ValueError(
            f"the final page of {x.shape[-1]} values takes {rows} rows of {pool.shape[-1]}, one a "
            f"layer, but the model has {len(pool)} layers: it can be served but not finetuned"
        )
    values, pages = tape.padded(x, pool.shape[-1]), [final_pages(pool, dims, places, row) for row in range(rows)]
    options = dict(first_row=first_row, implementation=kernels.page_write)
    return write_pages(as_one_layer(pool), 0, values, jnp.stack(pages, axis=1), **options).reshape(pool.shape)


def final_pages(pool, dims: Dimensions, places: jax.Array, row: int) -> jax.Array:
    """Pages of `as_one_layer` that hold one row of finals, -1 for no place: [tiles].

    With two finals of three rows on a page, place 5 is the second on page 2: layers 3, 4 and 5 of that page.
    """
    page, number = jnp.divmod(places, dims.finals_per_page)
    layer = number * dims.final_rows + row
    return jnp.where(places < 0, -1, layer * pool.shape[1] + page)


def as_one_layer(pool: jax.Array) -> jax.Array:
    """[layers, pages, 64, row] -> [1, layers * pages, 64, row], the pages of one layer after those of another."""
    return pool.reshape(1, -1, *pool.shape[2:])


def read_final(pool, dims: Dimensions, places, width: int) -> jax.Array:
    """Inverse of `write_final`, the leading columns: places [tiles] -> [tiles * 64, width]."""
    flat, rows = as_one_layer(pool), range(-(-width // pool.shape[-1]))
    parts = [tape.read(flat, 0, final_pages(pool, dims, places, row)[:, None], pool.shape[-1]) for row in rows]
    return jnp.concatenate(parts, axis=-1)[:, :width]


def chunk_logprobs(model: Decoder, x, batch) -> tuple:
    return prompt_logprobs(model.logits(x), batch.targets, MAX_LOGPROBS)


def record_chunk(history: jax.Array, layout: SlotLayout, batch) -> jax.Array:
    """Prompt tokens of the chunk part into their rows' history; out-of-range seats are dropped."""
    if not layout.chunk:
        return history
    offset = jnp.arange(PAGE_TOKENS, dtype=jnp.int32)
    valid = (offset < batch.tile_length[:, None]) & (batch.tile_row >= 0)[:, None]
    seat = jnp.where(valid, batch.tile_row[:, None], history.shape[0])
    position = batch.tile_position[:, None] + offset
    return history.at[seat, position].set(batch.tokens.reshape(-1, PAGE_TOKENS), mode="drop")
