"""Named cases of the page write: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.random_values import normal

PAGE = 64


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``width`` values into a pool of ``pages`` pages, ``dropped`` of them with a negative slot."""

    name: str
    width: int
    rows: int
    dropped: int
    pages: int
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``page_write``; slots are distinct and in random order."""
        random = np.random.default_rng(seed)
        slots = random.permutation(self.pages * PAGE)[: self.rows]
        slots[random.permutation(self.rows)[: self.dropped]] = -1 - random.integers(0, 100, self.dropped)
        return {
            "pool": normal(random, (self.layers, self.pages, PAGE, self.width), self.dtype),
            "layer": np.int32(self.layers - 1),
            "rows": normal(random, (self.rows, self.width), self.dtype),
            "slots": slots.astype(np.int32),
        }


def write(model: ModelShape, rows: int, pages: int, **options) -> Case:
    """K/V rows of ``rows`` tokens, a sixteenth of them dropped."""
    return Case(f"write {model.name} {rows} rows", model.row_width, rows, rows // 16, pages, **options)


LARGE = (
    write(LLAMA_3_1_8B, 64, 1024),
    write(LLAMA_3_1_8B, 2048, 1024),
    write(QWEN_2_5_7B, 2048, 1024),
    write(SMOLLM2_135M, 256, 1024),
)
"""Shapes worth timing."""

SMALL = (
    write(STORIES_260K, 48, 5),
    Case("one row", 16, 1, 0, 1, dtype="float32"),
    Case("every row dropped", 16, 5, 5, 2),
    Case("every slot written", 8, 128, 0, 2, layers=3, dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""
