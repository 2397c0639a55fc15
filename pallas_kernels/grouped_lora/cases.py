"""Named cases of the grouped low-rank product: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.grouped_lora.api import RANK_UNIT
from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.random_values import normal


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        inputs, outputs: widths of the linear layer.
        owner: adapter of each unit of 8 columns.
        tiles: (adapter, slots) of each run of slots.
    """

    name: str
    inputs: int
    outputs: int
    owner: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``grouped_lora``; a and b are of the size that keeps y near 1."""
        random = np.random.default_rng(seed)
        rank, adapters = len(self.owner) * RANK_UNIT, max(self.owner, default=0) + 1
        indices = np.repeat(*np.array(self.tiles, np.int32).T)
        return {
            "x": normal(random, (len(indices), self.inputs), self.dtype),
            "a": normal(random, (self.inputs, rank), self.dtype, self.inputs**-0.5),
            "b": normal(random, (rank, self.outputs), self.dtype, RANK_UNIT**-0.5),
            "indices": indices,
            "owner": np.array(self.owner, np.int32),
            "scale": random.uniform(0.5, 2.0, adapters).astype(np.float32),
        }


@dataclass(frozen=True)
class GradCase:
    """The gradients of one adapter of ``rank`` over ``slots`` slots."""

    name: str
    slots: int
    inputs: int
    outputs: int
    rank: int
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``grouped_lora_grad``."""
        random = np.random.default_rng(seed)
        return {
            "x": normal(random, (self.slots, self.inputs), self.dtype),
            "d_y": normal(random, (self.slots, self.outputs), self.dtype),
            "a": normal(random, (self.inputs, self.rank), self.dtype, self.inputs**-0.5),
            "b": normal(random, (self.rank, self.outputs), self.dtype, self.rank**-0.5),
            "scale": np.float32(1.5),
        }


def gate(model: ModelShape, owner: tuple[int, ...], tiles: tuple[tuple[int, int], ...]) -> Case:
    name = f"gate {model.name}, {max(owner)} adapters, {sum(slots for _, slots in tiles)} slots"
    return Case(name, model.hidden, model.feed_forward, owner, tiles)


def down(model: ModelShape, owner: tuple[int, ...], tiles: tuple[tuple[int, int], ...]) -> Case:
    name = f"down {model.name}, {max(owner)} adapters, {sum(slots for _, slots in tiles)} slots"
    return Case(name, model.feed_forward, model.hidden, owner, tiles)


EIGHT = tuple(np.repeat(range(1, 9), 2).tolist())
"""Eight adapters of rank 16."""

EIGHT_ROWS_EACH = tuple((adapter, 8) for adapter in range(1, 9))

LARGE = (
    gate(LLAMA_3_1_8B, (1, 1), ((0, 64), (1, 512))),
    gate(LLAMA_3_1_8B, EIGHT, EIGHT_ROWS_EACH),
    down(LLAMA_3_1_8B, EIGHT, EIGHT_ROWS_EACH),
    down(QWEN_2_5_7B, (1, 1, 2, 2), ((1, 64), (2, 512))),
    gate(SMOLLM2_135M, (1, 1), ((0, 8), (1, 256))),
)
"""Shapes worth timing."""

LARGE_GRAD = (
    GradCase("llama-3.1-8b o", 512, 4096, 4096, 16),
    GradCase("llama-3.1-8b gate", 2048, LLAMA_3_1_8B.hidden, LLAMA_3_1_8B.feed_forward, 16),
    GradCase("llama-3.1-8b down", 2048, LLAMA_3_1_8B.feed_forward, LLAMA_3_1_8B.hidden, 16),
    GradCase("qwen2.5-7b down", 512, QWEN_2_5_7B.feed_forward, QWEN_2_5_7B.hidden, 16),
    GradCase("smollm2-135m gate", 256, SMOLLM2_135M.hidden, SMOLLM2_135M.feed_forward, 16),
)
"""Gradient shapes worth timing."""

SMALL = (
    Case("three adapters of rank 8, 16 and 8", 24, 40, (2, 1, 1, 0, 3), ((1, 5), (0, 3), (3, 4), (2, 64), (1, 1))),
    Case("stories-260k", STORIES_260K.hidden, STORIES_260K.feed_forward, (1,), ((0, 4), (1, 64)), dtype="float32"),
    Case("units of an adapter apart", 16, 8, (1, 2, 1), ((2, 2), (1, 2)), dtype="float32"),
    Case("no slot has an adapter", 16, 8, (1, 2), ((0, 7),)),
    Case("an adapter that owns nothing", 16, 8, (2, 0), ((1, 3), (2, 1)), dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""

SMALL_GRAD = (
    GradCase("rank 8", 64, 24, 40, 8),
    GradCase("rank 16", 128, 40, 24, 16, dtype="float32"),
    GradCase("one slot", 1, 16, 8, 8, dtype="float32"),
)
"""Gradient edges, cheap on a CPU."""
