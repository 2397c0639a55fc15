"""From the scheduler's decision to the packed arrays of the steps. Plain numpy; the only code that fills batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flexjax.engine.adapters import AdapterTable, AdapterVersion
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.request import MAX_STOP_TOKEN_IDS, Request, SamplingLevel, SamplingParams
from flexjax.scheduler.output import DecodeSlot, Iteration, MicrobatchPages, PromptSegment, WindowSegment
from flexjax.state import KV_COLUMNS, Dimensions
from flexjax.step_batch import (
    SAMPLING_WORDS,
    backward_fields,
    forward_fields,
    host_batch,
    loss_fields,
    sampling_fields,
)


@dataclass
class Serving:
    """A request as the engine knows it. What a batch says of it again and again is packed once.

    Attributes:
        seed: of its random numbers, 32 bits.
        tokens: prompt and the output read so far.
        sampling: how it samples, as the words of `SAMPLING_WORDS`.
        level: the least that can sample so.
    """

    request: Request
    adapter: AdapterVersion
    seed: int
    tokens: list[int]
    sampling: bytes = field(init=False)
    level: SamplingLevel = field(init=False)
    _pages: tuple[int, ...] = field(init=False, default=())
    _page_words: bytes = field(init=False, default=b"")

    def __post_init__(self):
        self.sampling = sampling_words(self.request.sampling, len(self.request.prompt), self.seed)
        self.level = self.request.sampling.level

    def page_words(self, pages: tuple[int, ...], width: int) -> bytes:
        """The page table of its row, ``width`` words. They are written anew only for other pages: a sequence has the
        same tuple of them until it grows beyond the last one."""
        if pages is not self._pages or not self._page_words:
            words = np.zeros(width, np.int32)
            words[: len(pages)] = pages
            self._pages, self._page_words = pages, words.tobytes()
        return self._page_words

    def held_back(self, position: int) -> list[int]:
        """Tokens that must not be sampled for this position of the sequence."""
        if position - len(self.request.prompt) >= self.request.sampling.min_tokens:
            return []
        return sorted(self.request.stop_token_ids)[:MAX_STOP_TOKEN_IDS]


def sampling_words(params: SamplingParams, prompt: int, seed: int) -> bytes:
    """One request's share of a sampling batch but for its position; ``prompt`` in tokens."""
    words = np.zeros((), SAMPLING_WORDS)
    for name in ("temperature", "top_p", "min_p", "top_k"):
        words[name] = getattr(params, name)
    words["repetition"] = params.repetition_penalty
    words["presence"], words["frequency"] = params.presence_penalty, params.frequency_penalty
    words["prompt_length"], words["seed"] = prompt, seed
    return words.tobytes()


@dataclass(frozen=True)
class Training:
    """A microbatch in flight.

    Attributes:
        packed: its sequences; pages: of their blocks of 64 slots.
        adapter: the version its tape pins.
        dropout: LoRA dropout rate, 0 in an evaluation.
        seed: different for every microbatch of every job.
        lean: its tape keeps only what `Dimensions.lean_tape` says.
        block_starts: [blocks] int32, the first block of the sequence that each block belongs to.
        table: [blocks, columns] int32, the pages of every block: K/V, tape columns.
        finals: [blocks] int32, the places of final hidden states.
    """

    packed: PackedMicrobatch
    pages: MicrobatchPages
    adapter: AdapterVersion
    dropout: float = 0.0
    seed: int = 0
    lean: bool = False
    block_starts: np.ndarray = field(init=False)
    table: np.ndarray = field(init=False)
    finals: np.ndarray = field(init=False)

    def __post_init__(self):
        starts = np.asarray(self.packed.starts) // PAGE_TOKENS
        counts = [tiles_for(length) for length in self.packed.lengths]
        object.__setattr__(self, "block_starts", np.repeat(starts, counts).astype(np.int32))
        object.__setattr__(self, "table", np.array(self.pages.blocks, np.int32))
        object.__setattr__(self, "finals", np.array(self.pages.final_places, np.int32))

    def tile_seed(self, block: int | np.ndarray) -> int | np.ndarray:
        """Dropout seed of the first token of a block, or of several; a block's other tokens count up from it."""
        return ((self.seed * 0x9E3779B1 & 0xFFFFFFFF) + block * PAGE_TOKENS) & 0xFFFFFFFF


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
    if iteration.decode:
        fill_decode(batch, iteration.decode, serving, dims.context_pages)
    for segment in iteration.prompts:
        fill_prompt(batch, segment, serving[segment.request_id], iteration.layout)
    for segment in iteration.windows:
        fill_window(batch, segment, training[segment.microbatch], iteration.layout, dims)
    return packed


def sampling_batch(iteration: Iteration, serving: Mapping[int, Serving]) -> SamplingBatch:
    """How the rows of an iteration sample."""
    packed, batch = host_batch(sampling_fields(iteration.layout.rows))
    sampled = iteration.sampled_rows
    if not sampled:
        return SamplingBatch(packed, SamplingLevel.GREEDY)
    requests = [serving[request_id] for _, request_id, _ in sampled]
    rows = np.array([row for row, _, _ in sampled])
    batch.sampled[rows] = 1
    batch.position[rows] = [position for _, _, position in sampled]
    words = np.frombuffer(b"".join([each.sampling for each in requests]), SAMPLING_WORDS)
    for name in SAMPLING_WORDS.names:
        getattr(batch, name)[rows] = words[name]
    level = max([each.level for each in requests])
    if level is SamplingLevel.PENALISED:
        for request, (row, _, position) in zip(requests, sampled, strict=True):
            held_back = request.held_back(position)
            batch.banned[row, : len(held_back)] = held_back
    return SamplingBatch(packed, level)


def fill_decode(batch, slots: tuple[DecodeSlot, ...], serving: Mapping[int, Serving], width: int) -> None:
    """Rows that compute their newest token; ``width`` pages to a row's table."""
    requests = [serving[slot.request_id] for slot in slots]
    rows = np.array([slot.row for slot in slots])
    batch.row_position[rows] = [slot.position for slot in slots]
    batch.row_adapter[rows] = [each.adapter.index for each in requests]
    tables = b"".join([each.page_words(slot.pages, width) for each, slot in zip(requests, slots, strict=True)])
    batch.row_pages[rows] = np.frombuffer(tables, np.int32).reshape(-1, width)
    batch.sample_slot[rows] = rows


def fill_prompt(batch, segment: PromptSegment, serving: Serving, layout) -> None:
    tokens = serving.tokens[segment.start : segment.start + segment.length]
    batch.tokens[segment.slot : segment.slot + segment.length] = tokens
    if layout.prompt_logprobs:
        following = serving.tokens[segment.start + 1 : segment.start + segment.length + 1]
        batch.targets[segment.slot : segment.slot + len(following)] = following
    tiles = fill_tiles(batch, segment)
    batch.tile_row[tiles] = segment.row
    batch.tile_adapter[tiles] = serving.adapter.index
    batch.tile_pages[tiles, : len(segment.pages)] = segment.pages
    if segment.samples:
        batch.sample_slot[segment.row] = layout.rows + segment.slot + segment.length - 1


def fill_window(batch, segment: WindowSegment, training: Training, layout, dims: Dimensions) -> None:
    first, count = segment.block, tiles_for(segment.length)
    tokens = training.packed.input_ids[first * PAGE_TOKENS : first * PAGE_TOKENS + segment.length]
    batch.tokens[segment.slot : segment.slot + segment.length] = tokens
    tiles, own = fill_tiles(batch, segment), training.table[first : first + count]
    before = segment.start // PAGE_TOKENS  # blocks of the sequence that earlier windows computed
    seen = np.arange(before + count) <= before + np.arange(count)[:, None]
    batch.tile_pages[tiles, : before + count] = np.where(seen, training.table[first - before : first + count, 0], 0)
    batch.tile_adapter[tiles] = training.adapter.index
    batch.final_place[tiles] = training.finals[first : first + count]
    columns = list(dims.lean_columns) if training.lean else slice(own.shape[1] - KV_COLUMNS)
    batch.tape_pages[tiles, columns] = own[:, KV_COLUMNS:]
    if layout.dropout:
        batch.dropout_seed[tiles] = training.tile_seed(first + np.arange(count))
        batch.dropout_rate[tiles] = training.dropout


def fill_tiles(batch, segment: PromptSegment | WindowSegment) -> slice:
    """Positions and lengths of a segment's tiles; returns which tiles they are."""
    first, count = segment.slot // PAGE_TOKENS, tiles_for(segment.length)
    tiles, offsets = slice(first, first + count), np.arange(count) * PAGE_TOKENS
    batch.tile_position[tiles] = segment.start + offsets
    batch.tile_length[tiles] = np.minimum(PAGE_TOKENS, segment.length - offsets)
    return tiles


def loss_batch(dims: Dimensions, training: Training, window: int) -> np.ndarray:
    """The packed batch of one loss window."""
    packed, batch = host_batch(loss_fields(dims))
    start = window * dims.window
    batch.start[...] = start
    batch.normaliser[...] = 1 / training.packed.trained_tokens
    targets = training.packed.targets[start : start + dims.window]
    batch.targets[: len(targets)] = targets
    own = training.finals[window_blocks(dims, window)]
    batch.final_place[: len(own)] = own
    return packed


def backward_batch(dims: Dimensions, training: Training, layer: int, window: int) -> np.ndarray:
    """The packed batch of one backward unit."""
    packed, batch = host_batch(backward_fields(dims.lean if training.lean else dims))
    blocks, starts = len(training.table), training.block_starts
    batch.layer[...], batch.start[...] = layer, window * dims.window
    batch.kv_page[:blocks] = training.table[:, 0]
    batch.block_start[...] = np.arange(len(batch.block_start))
    batch.block_start[:blocks] = starts
    own = window_blocks(dims, window)
    numbers = np.arange(blocks)[own]
    tiles = slice(len(numbers))
    batch.tile_position[tiles] = (numbers - starts[own]) * PAGE_TOKENS
    batch.tape_pages[tiles], batch.final_place[tiles] = training.table[own, KV_COLUMNS:], training.finals[own]
    batch.dropout_seed[tiles], batch.dropout_rate[tiles] = training.tile_seed(numbers), training.dropout
    batch.scale[...] = training.adapter.scale
    return packed


def window_blocks(dims: Dimensions, window: int) -> slice:
    tiles = dims.window // PAGE_TOKENS
    return slice(window * tiles, (window + 1) * tiles)
