"""From the scheduler's decision to the packed arrays of the steps. Plain numpy; the only code that fills batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flexjax.engine.adapters import AdapterTable, AdapterVersion
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import MAX_STOP_TOKEN_IDS, Request, SamplingLevel
from flexjax.scheduler.output import Iteration, MicrobatchPages, PromptSegment, WindowSegment
from flexjax.state import Dimensions
from flexjax.step_batch import backward_fields, forward_fields, host_batch, loss_fields, sampling_fields


@dataclass
class Serving:
    """A request as the engine knows it.

    Attributes:
        seed: of its random numbers, 32 bits.
        tokens: prompt and the output read so far.
    """

    request: Request
    adapter: AdapterVersion
    seed: int
    tokens: list[int]


@dataclass(frozen=True)
class Training:
    """A microbatch in flight.

    Attributes:
        packed: its sequences; pages: per 64-block [K/V, final hidden, tape columns ...].
        adapter: the version its tape pins.
        dropout: LoRA dropout rate, 0 in an evaluation.
        seed: different for every microbatch of every job.
    """

    packed: PackedMicrobatch
    pages: MicrobatchPages
    adapter: AdapterVersion
    dropout: float = 0.0
    seed: int = 0
    block_starts: np.ndarray = field(init=False)

    def __post_init__(self):
        """block_starts [blocks]: the first block of the sequence that each block belongs to."""
        starts = np.asarray(self.packed.starts) // PAGE_TOKENS
        counts = [tiles_for(length) for length in self.packed.lengths]
        object.__setattr__(self, "block_starts", np.repeat(starts, counts).astype(np.int32))

    def tile_seed(self, block: int) -> int:
        """Dropout seed of the first token of a block; the block's other tokens count up from it."""
        return (self.seed * 0x9E3779B1 + block * PAGE_TOKENS) & 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingBatch:
    """What the sampling step is told.

    Attributes:
        packed: as `sampling_fields` says.
        level: the least that serves every sampled row.
    """

    packed: np.ndarray
    level: SamplingLevel


def forward_batch(
    dims: Dimensions,
    iteration: Iteration,
    serving: Mapping[int, Serving],
    training: Mapping[int, Training],
    adapters: AdapterTable,
) -> np.ndarray:
    """The packed batch of an iteration's forward step."""
    packed, batch = host_batch(forward_fields(dims, iteration.layout))
    adapters.fill(batch.owner, batch.scale)
    for slot in iteration.decode:
        batch.row_position[slot.row] = slot.position
        batch.row_pages[slot.row, : len(slot.pages)] = slot.pages
        batch.row_adapter[slot.row] = serving[slot.request_id].adapter.index
        batch.sample_slot[slot.row] = slot.row
    for segment in iteration.prompts:
        fill_prompt(batch, segment, serving[segment.request_id], iteration.layout)
    for segment in iteration.windows:
        fill_window(batch, segment, training[segment.microbatch], iteration.layout)
    return packed


def sampling_batch(iteration: Iteration, serving: Mapping[int, Serving]) -> SamplingBatch:
    """How the rows of an iteration sample."""
    packed, batch = host_batch(sampling_fields(iteration.layout.rows))
    level = SamplingLevel.GREEDY
    for row, request_id, position in iteration.sampled_rows:
        fill_sampling(batch, row, serving[request_id], position)
        level = max(level, serving[request_id].request.sampling.level)
    return SamplingBatch(packed, level)


def fill_prompt(batch, segment: PromptSegment, serving: Serving, layout) -> None:
    tokens = serving.tokens[segment.start : segment.start + segment.length]
    batch.tokens[segment.slot : segment.slot + segment.length] = tokens
    if layout.prompt_logprobs:
        following = serving.tokens[segment.start + 1 : segment.start + segment.length + 1]
        batch.targets[segment.slot : segment.slot + len(following)] = following
    for tile in fill_tiles(batch, segment):
        batch.tile_row[tile] = segment.row
        batch.tile_adapter[tile] = serving.adapter.index
        batch.tile_pages[tile, : len(segment.pages)] = segment.pages
    if segment.samples:
        batch.sample_slot[segment.row] = layout.rows + segment.slot + segment.length - 1


def fill_window(batch, segment: WindowSegment, training: Training, layout) -> None:
    first = segment.block * PAGE_TOKENS
    tokens = training.packed.input_ids[first : first + segment.length]
    batch.tokens[segment.slot : segment.slot + segment.length] = tokens
    beginning = segment.block - segment.start // PAGE_TOKENS
    for offset, tile in enumerate(fill_tiles(batch, segment)):
        block = segment.block + offset
        table = [pages[0] for pages in training.pages.blocks[beginning : block + 1]]
        batch.tile_pages[tile, : len(table)] = table
        batch.tile_adapter[tile] = training.adapter.index
        own = training.pages.blocks[block]
        batch.final_page[tile] = own[1]
        batch.tape_pages[tile, : len(own) - 2] = own[2:]
        if layout.dropout:
            batch.dropout_seed[tile] = training.tile_seed(block)
            batch.dropout_rate[tile] = training.dropout


def fill_tiles(batch, segment: PromptSegment | WindowSegment) -> range:
    """Positions and lengths of a segment's tiles; returns which tiles they are."""
    first = segment.slot // PAGE_TOKENS
    tiles = range(first, first + tiles_for(segment.length))
    for offset, tile in enumerate(tiles):
        batch.tile_position[tile] = segment.start + offset * PAGE_TOKENS
        batch.tile_length[tile] = min(PAGE_TOKENS, segment.length - offset * PAGE_TOKENS)
    return tiles


def fill_sampling(batch, row: int, serving: Serving, position: int) -> None:
    params, prompt = serving.request.sampling, len(serving.request.prompt)
    batch.sampled[row] = 1
    batch.position[row] = position
    batch.prompt_length[row] = prompt
    batch.temperature[row] = params.temperature
    batch.top_p[row], batch.top_k[row], batch.min_p[row] = params.top_p, params.top_k, params.min_p
    batch.repetition[row] = params.repetition_penalty
    batch.presence[row], batch.frequency[row] = params.presence_penalty, params.frequency_penalty
    batch.seed[row] = serving.seed
    if position - prompt < params.min_tokens:
        held_back = sorted(serving.request.stop_token_ids)[:MAX_STOP_TOKEN_IDS]
        batch.banned[row, : len(held_back)] = held_back


def loss_batch(dims: Dimensions, training: Training, window: int) -> np.ndarray:
    """The packed batch of one loss window."""
    packed, batch = host_batch(loss_fields(dims))
    start = window * dims.window
    batch.start[...] = start
    batch.normaliser[...] = 1 / training.packed.trained_tokens
    targets = training.packed.targets[start : start + dims.window]
    batch.targets[: len(targets)] = targets
    pages = column(window_blocks(dims, training, window), 1)
    batch.final_page[: len(pages)] = pages
    return packed


def backward_batch(dims: Dimensions, training: Training, layer: int, window: int) -> np.ndarray:
    """The packed batch of one backward unit."""
    packed, batch = host_batch(backward_fields(dims))
    blocks = training.pages.blocks
    windows = -(-len(blocks) * PAGE_TOKENS // dims.window)
    batch.layer[...], batch.start[...] = layer, window * dims.window
    batch.first_of_layer[...] = window == windows - 1
    batch.kv_page[: len(blocks)] = column(blocks, 0)
    batch.block_start[...] = np.arange(len(batch.block_start))
    batch.block_start[: len(blocks)] = training.block_starts
    own = window_blocks(dims, training, window)
    first = window * dims.window // PAGE_TOKENS
    for tile, pages in enumerate(own):
        block = first + tile
        batch.tile_position[tile] = (block - training.block_starts[block]) * PAGE_TOKENS
        batch.tape_pages[tile] = pages[2:]
        batch.dropout_seed[tile], batch.dropout_rate[tile] = training.tile_seed(block), training.dropout
    batch.scale[...] = training.adapter.scale
    return packed


def window_blocks(dims: Dimensions, training: Training, window: int) -> Sequence[tuple[int, ...]]:
    tiles = dims.window // PAGE_TOKENS
    return training.pages.blocks[window * tiles : (window + 1) * tiles]


def column(blocks: Sequence[tuple[int, ...]], index: int) -> list[int]:
    return [pages[index] for pages in blocks]
