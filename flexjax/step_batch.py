"""StepBatch: what the host tells a step, packed into one int32 array so that a step has few arguments.

The host writes through numpy views of the packed array (`host_batch`), the device reads named slices of it
(`unpack`); both follow the same table of fields.
"""

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.layout import PAGE_TOKENS, RANK_UNIT, SlotLayout
from flexjax.models.lora import PRODUCTS
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

SAMPLING_WORDS = np.dtype(
    [
        *((name, FLOAT) for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")),
        *(("top_k", INT), ("seed", BITS), ("prompt_length", INT)),
    ]
)
"""How a request samples, whatever the iteration: one word a field."""

IDLE_SAMPLING = dict.fromkeys(SAMPLING_WORDS.names, 0) | {"top_p": 1, "repetition": 1}


@functools.cache
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
        "final_place": Field((tiles,), INT, -1),
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


@functools.cache
def sampling_fields(rows: int) -> Fields:
    """How each row samples; see `SamplingParams`."""
    fields = {
        "sampled": Field((rows,)),  # 1: the row takes part
        "position": Field((rows,)),  # of the sampled token in its sequence
        **{name: Field((rows,), SAMPLING_WORDS[name], idle) for name, idle in IDLE_SAMPLING.items()},
        "banned": Field((rows, MAX_STOP_TOKEN_IDS), INT, -1),
    }
    return tuple(fields.items())


def adapter_fields(dims: Dimensions) -> dict[str, Field]:
    """Who owns which part of the flat rank axis, in every product that an adapter may add to or not; and each
    adapter's scale."""
    units = dims.rank_capacity // RANK_UNIT
    return {"owner": Field((len(PRODUCTS), units)), "scale": Field((dims.adapters,), FLOAT)}


@functools.cache
def loss_fields(dims: Dimensions) -> Fields:
    """Fields of a loss window."""
    return (
        ("start", Field(())),  # first slot of the window on the microbatch axis
        ("final_place", Field((dims.window // PAGE_TOKENS,), INT, -1)),
        ("targets", Field((dims.window,), INT, -1)),  # token to predict at each slot, -1: none
        ("normaliser", Field((), FLOAT, 1)),  # 1 / trained tokens of the accumulation group
    )


@functools.cache
def backward_fields(dims: Dimensions) -> Fields:
    """Fields of a backward unit. A "block" is 64 slots of the microbatch axis."""
    blocks, tiles = dims.microbatch // PAGE_TOKENS, dims.window // PAGE_TOKENS
    return (
        ("layer", Field(())),
        ("start", Field(())),  # first slot of the window on the microbatch axis
        ("kv_page", Field((blocks,))),
        ("block_start", Field((blocks,))),  # first block of the sequence that the block belongs to
        ("tile_position", Field((tiles,))),
        ("tape_pages", Field((tiles, dims.tape_layout.columns), INT, -1)),
        ("final_place", Field((tiles,), INT, -1)),
        ("scale", Field((), FLOAT, 1)),
        ("dropout_seed", Field((tiles,), BITS)),
        ("dropout_rate", Field((tiles,), FLOAT)),
    )


def packed_words(fields: Fields) -> int:
    return sum(field.words for _, field in fields)


@functools.cache
def idle_words(fields: Fields) -> np.ndarray:
    """The packed batch in which nothing takes part. Not to be changed."""
    words = [np.full(field.words, field.idle, field.dtype).view(np.int32) for _, field in fields]
    return np.concatenate(words)


@functools.cache
def places_of(fields: Fields) -> dict[str, tuple[slice, Field]]:
    """Where each field lies in the packed array."""
    places, offset = {}, 0
    for name, field in fields:
        places[name] = slice(offset, offset + field.words), field
        offset += field.words
    return places


def host_batch(fields: Fields) -> tuple[np.ndarray, SimpleNamespace]:
    """An idle batch: the packed int32 array and writable named views into it."""
    packed, places = idle_words(fields).copy(), places_of(fields).items()
    views = {name: packed[place].view(field.dtype).reshape(field.shape) for name, (place, field) in places}
    return packed, SimpleNamespace(**views)


def unpack(packed: jax.Array, fields: Fields) -> SimpleNamespace:
    """Named device arrays from the packed int32 array."""
    arrays = {}
    for name, (place, field) in places_of(fields).items():
        words = packed[place].reshape(field.shape)
        arrays[name] = words if field.dtype == INT else jax.lax.bitcast_convert_type(words, jnp.dtype(field.dtype))
    return SimpleNamespace(**arrays)
