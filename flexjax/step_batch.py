"""StepBatch: what the host tells a step, packed into one int32 array so that a step has few arguments.

The host writes through numpy views of the packed array (`host_batch`), the device reads named slices of it
(`unpack`); both follow the same table of fields.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.layout import PAGE_TOKENS, RANK_UNIT, SlotLayout
from flexjax.request import MAX_STOP_TOKEN_IDS
from flexjax.state import Dimensions


@dataclass(frozen=True)
class Field:
    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.int32)
    idle: float = 0

    @property
    def words(self) -> int:
        return math.prod(self.shape)


INT, FLOAT, BITS = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint32)
Fields = tuple[tuple[str, Field], ...]


def forward_fields(dims: Dimensions, layout: SlotLayout) -> Fields:
    """Fields of a forward step. "Idle" values make a slot, row or tile take no part."""
    rows, tiles, pages = layout.rows, layout.tiles, dims.context_pages
    decode = {
        "row_position": Field((rows,), INT, -1),  # position of the token that the row's decode slot computes
        "row_pages": Field((rows, pages)),  # page table of the row
        "row_adapter": Field((rows,)),
    }
    chunk = {
        "tokens": Field((layout.chunk,)),
        "tile_position": Field((tiles,)),  # position of the tile's first token, a multiple of 64
        "tile_length": Field((tiles,)),  # tokens in the tile, 0 when idle
        "tile_pages": Field((tiles, pages)),
        "tile_adapter": Field((tiles,)),
        "tile_row": Field((tiles,), INT, -1),  # row whose history the tokens belong to, -1 for finetuning
    }
    tape = {
        "tape_pages": Field((tiles, dims.tape_layout.columns), INT, -1),
        "final_page": Field((tiles,), INT, -1),
    }
    dropout = {"dropout_seed": Field((tiles,), BITS), "dropout_rate": Field((tiles,), FLOAT)}
    sample = {"sample_slot": Field((rows,), INT, -1)}  # slot whose hidden state gives the row's next token, -1: none
    fields = decode | sample | adapter_fields(dims)
    if layout.chunk:
        fields |= chunk
    if layout.prompt_logprobs:
        fields["targets"] = Field((layout.chunk,))  # the token after each slot's, for prompt log-probabilities
    if layout.tape:
        fields |= tape
    if layout.dropout:
        fields |= dropout
    return tuple(fields.items())


def sampling_fields(rows: int) -> Fields:
    """How each row samples; see `SamplingParams`."""
    fields = {
        "sampled": Field((rows,)),  # 1: the row takes part
        "position": Field((rows,)),  # of the sampled token in its sequence
        "temperature": Field((rows,), FLOAT),
        "top_p": Field((rows,), FLOAT, 1),
        "min_p": Field((rows,), FLOAT),
        "top_k": Field((rows,)),
        "repetition": Field((rows,), FLOAT, 1),
        "presence": Field((rows,), FLOAT),
        "frequency": Field((rows,), FLOAT),
        "seed": Field((rows,), BITS),
        "prompt_length": Field((rows,)),
        "banned": Field((rows, MAX_STOP_TOKEN_IDS), INT, -1),
    }
    return tuple(fields.items())


def adapter_fields(dims: Dimensions) -> dict[str, Field]:
    """Who owns which part of the flat rank axis, and each adapter's scale."""
    return {"owner": Field((dims.rank_capacity // RANK_UNIT,)), "scale": Field((dims.adapters,), FLOAT)}


def loss_fields(dims: Dimensions) -> Fields:
    """Fields of a loss window."""
    return (
        ("start", Field(())),  # first slot of the window on the microbatch axis
        ("final_page", Field((dims.window // PAGE_TOKENS,), INT, -1)),
        ("targets", Field((dims.window,), INT, -1)),  # token to predict at each slot, -1: none
        ("normaliser", Field((), FLOAT, 1)),  # 1 / trained tokens of the accumulation group
    )


def backward_fields(dims: Dimensions) -> Fields:
    """Fields of a backward unit. A "block" is 64 slots of the microbatch axis."""
    blocks, tiles = dims.microbatch // PAGE_TOKENS, dims.window // PAGE_TOKENS
    return (
        ("layer", Field(())),
        ("start", Field(())),  # first slot of the window on the microbatch axis
        ("first_of_layer", Field(())),  # 1: nothing has been accumulated for this layer's keys and values yet
        ("kv_page", Field((blocks,))),
        ("block_start", Field((blocks,))),  # first block of the sequence that the block belongs to
        ("tile_position", Field((tiles,))),
        ("tape_pages", Field((tiles, dims.tape_layout.columns), INT, -1)),
        ("scale", Field((), FLOAT, 1)),
        ("dropout_seed", Field((tiles,), BITS)),
        ("dropout_rate", Field((tiles,), FLOAT)),
    )


def packed_words(fields: Fields) -> int:
    return sum(field.words for _, field in fields)


def host_batch(fields: Fields) -> tuple[np.ndarray, SimpleNamespace]:
    """An idle batch: the packed int32 array and writable named views into it."""
    packed = np.zeros(packed_words(fields), np.int32)
    views, offset = {}, 0
    for name, field in fields:
        view = packed[offset : offset + field.words].view(field.dtype).reshape(field.shape)
        view[...] = field.idle
        views[name] = view
        offset += field.words
    return packed, SimpleNamespace(**views)


def unpack(packed: jax.Array, fields: Fields) -> SimpleNamespace:
    """Named device arrays from the packed int32 array."""
    arrays, offset = {}, 0
    for name, field in fields:
        words = packed[offset : offset + field.words].reshape(field.shape)
        arrays[name] = words if field.dtype == INT else jax.lax.bitcast_convert_type(words, jnp.dtype(field.dtype))
        offset += field.words
    return SimpleNamespace(**arrays)
