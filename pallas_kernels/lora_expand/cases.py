"""Named cases of the low-rank expansion: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.lora_expand.api import RANK_UNIT
from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.random_values import normal


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        widths: output widths of the modules side by side.
        owner: adapter of each unit of 8 columns.
        tiles: (adapter, slots) of each run of slots.
    """

    name: str
    widths: tuple[int, ...]
    owner: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``lora_expand``; the contributions are near 1, as y is."""
        random = np.random.default_rng(seed)
        rank, adapters = len(self.owner) * RANK_UNIT, max(self.owner, default=0) + 1
        indices = np.repeat(*np.array(self.tiles, np.int32).T)
        return {
            "y": normal(random, (len(indices), sum(self.widths)), self.dtype),
            "low": normal(random, (len(indices), len(self.widths) * rank), "float32"),
            "b": normal(random, (self.layers, rank, sum(self.widths)), self.dtype, RANK_UNIT**-0.5),
            "layer": np.int32(self.layers - 1),
            "indices": indices,
            "owner": np.array(self.owner, np.int32),
            "scale": random.uniform(0.5, 2.0, adapters).astype(np.float32),
            "widths": self.widths,
        }


def qkv(model: ModelShape) -> tuple[int, ...]:
    """Widths of the fused query, key and value product."""
    keys = model.kv_heads * model.head_size
    return model.query_heads * model.head_size, keys, keys


def gate_up(model: ModelShape) -> tuple[int, ...]:
    """Widths of the fused gate and up product."""
    return model.feed_forward, model.feed_forward


EIGHT = tuple(np.repeat(range(1, 9), 2).tolist())
"""Eight adapters of rank 16."""

EIGHT_ROWS_EACH = tuple((adapter, 8) for adapter in range(1, 9))
ONE_ROW_EACH = tuple((adapter, 1) for adapter in range(1, 9))
WINDOW = ((0, 64), (3, 2048))
"""Rows without an adapter beside a window of one."""

LARGE = (
    Case("gate_up llama-3.1-8b, 8 rows", gate_up(LLAMA_3_1_8B), EIGHT, ONE_ROW_EACH),
    Case("gate_up llama-3.1-8b, 64 rows", gate_up(LLAMA_3_1_8B), EIGHT, EIGHT_ROWS_EACH),
    Case("gate_up llama-3.1-8b, window", gate_up(LLAMA_3_1_8B), EIGHT, WINDOW),
    Case("qkv llama-3.1-8b, 64 rows", qkv(LLAMA_3_1_8B), EIGHT, EIGHT_ROWS_EACH),
    Case("qkv llama-3.1-8b, window", qkv(LLAMA_3_1_8B), EIGHT, WINDOW),
    Case("down llama-3.1-8b, 64 rows", (LLAMA_3_1_8B.hidden,), EIGHT, EIGHT_ROWS_EACH),
    Case("down llama-3.1-8b, window", (LLAMA_3_1_8B.hidden,), EIGHT, WINDOW),
    Case("gradient llama-3.1-8b, window", (LLAMA_3_1_8B.hidden,), (1, 1), ((1, 2048),)),
    Case("qkv qwen2.5-7b, 64 rows", qkv(QWEN_2_5_7B), EIGHT, EIGHT_ROWS_EACH),
    Case("gate_up smollm2-135m, 8 rows", gate_up(SMOLLM2_135M), EIGHT, ONE_ROW_EACH),
)
"""Shapes worth timing."""

SMALL = (
    Case("three adapters of rank 8, 16 and 8", (40, 24), (2, 1, 1, 0, 3), ((1, 5), (0, 3), (3, 4), (2, 64), (1, 1))),
    Case("stories-260k", gate_up(STORIES_260K), (1,), ((0, 4), (1, 64)), dtype="float32"),
    Case("units of an adapter apart", (16, 8, 8), (1, 2, 1), ((2, 2), (1, 2)), dtype="float32"),
    Case("no slot has an adapter", (16, 8), (1, 2), ((0, 7),)),
    Case("an adapter that owns nothing", (16,), (2, 0), ((1, 3), (2, 1)), dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""

TILED = (
    Case("one row", (64,), (1,), ((1, 1),)),
    Case("mixed rows, three modules", (128, 64, 64), (2, 1, 1, 0, 3), ((1, 2), (0, 3), (3, 1), (2, 2))),
    Case("rank 16, two tiles of one adapter", (128,), (1, 1), ((1, 128),), dtype="float16"),
    Case("an odd row before tiles", (128, 128), (1, 2, 2, 2, 2, 3), ((1, 1), (3, 64), (0, 64), (2, 64))),
    Case("rows without an adapter beside a tile", (192,), (0, 0, 0, 0, 1, 1), ((0, 8), (1, 64)), layers=3),
    Case("more pieces than are in flight", (64,), tuple(range(1, 21)), ((20, 3), (1, 2), (0, 2), (7, 60))),
    Case("no slot has an adapter", (64,), (1, 2), ((0, 66),)),
)
"""Shapes that the kernel takes, small enough for the interpreter."""
