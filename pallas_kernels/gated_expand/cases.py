"""Named cases of the gated expansion: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.lora_expand import cases as expand_cases
from pallas_kernels.lora_expand.cases import EIGHT, EIGHT_ROWS_EACH, ONE_ROW_EACH, WINDOW
from pallas_kernels.model_shapes import LLAMA_3_1_8B, SMOLLM2_135M, STORIES_260K

NEITHER, GATE, UP, BOTH = (0, 0), (1, 0), (0, 1), (1, 1)
"""Whether gate and whether up is kept."""


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        width: columns of gate, and of up.
        owner: adapter of each unit of 8 columns.
        tiles: (adapter, slots) of each run of slots.
        kept: of each tile of 64 slots, of which the first may have fewer, what is kept; () for nothing, unasked.
    """

    name: str
    width: int
    owner: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]
    kept: tuple[tuple[int, int], ...] = ()
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``gated_expand``; gate, up and the contributions to them are near 1."""
        widths = self.width, self.width
        product = expand_cases.Case(self.name, widths, self.owner, self.tiles, self.layers, self.dtype)
        arguments = product.make(seed)
        del arguments["widths"]
        return arguments | ({"kept": np.array(self.kept, bool)} if self.kept else {})


TAPED = (NEITHER, *[GATE] * 32)
"""Rows, and a window whose tape keeps gate."""

LARGE = (
    Case("llama-3.1-8b, 8 rows", LLAMA_3_1_8B.feed_forward, EIGHT, ONE_ROW_EACH),
    Case("llama-3.1-8b, 64 rows", LLAMA_3_1_8B.feed_forward, EIGHT, EIGHT_ROWS_EACH),
    Case("llama-3.1-8b, 256 rows", LLAMA_3_1_8B.feed_forward, EIGHT, ((1, 100), (0, 56), (7, 100))),
    Case("llama-3.1-8b, window", LLAMA_3_1_8B.feed_forward, EIGHT, WINDOW),
    Case("llama-3.1-8b, taped window", LLAMA_3_1_8B.feed_forward, EIGHT, WINDOW, TAPED),
    Case("llama-3.1-8b, window taped whole", LLAMA_3_1_8B.feed_forward, EIGHT, WINDOW, (NEITHER, *[BOTH] * 32)),
    Case("llama-3.1-8b, rank axis of 16", LLAMA_3_1_8B.feed_forward, EIGHT[:2], WINDOW, TAPED),
    Case("llama-3.1-8b, rank axis of 256", LLAMA_3_1_8B.feed_forward, EIGHT * 2, WINDOW, TAPED),
    Case("llama-3.1-8b, rank axis of 1024", LLAMA_3_1_8B.feed_forward, EIGHT * 8, WINDOW, TAPED),
    Case("smollm2-135m, 8 rows", SMOLLM2_135M.feed_forward, EIGHT, ONE_ROW_EACH),
)
"""Shapes worth timing, and every way of cutting them."""

SMALL = (
    Case(
        "three adapters of rank 8, 16 and 8",
        40,
        (2, 1, 1, 0, 3),
        ((1, 5), (0, 3), (3, 4), (2, 64), (1, 1)),
        (BOTH, NEITHER),
    ),
    Case("stories-260k", STORIES_260K.feed_forward, (1,), ((0, 4), (1, 64)), (NEITHER, UP), dtype="float32"),
    Case("units of an adapter apart", 16, (1, 2, 1), ((2, 2), (1, 2)), (BOTH,), dtype="float32"),
    Case("no slot has an adapter", 24, (1, 2), ((0, 7),)),
    Case("an adapter that owns nothing", 16, (2, 0), ((1, 3), (2, 1)), (GATE,), dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""

TILED = (
    Case("one row", 64, (1,), ((1, 1),)),
    Case("mixed rows", 128, (2, 1, 1, 0, 3), ((1, 2), (0, 3), (3, 1), (2, 2)), (BOTH,)),
    Case("rank 16, two tiles of one adapter", 128, (1, 1), ((1, 128),), (NEITHER, GATE), dtype="float16"),
    Case(
        "an odd row before tiles",
        128,
        (1, 2, 2, 2, 2, 3),
        ((1, 1), (3, 64), (0, 64), (2, 64)),
        (NEITHER, UP, BOTH, NEITHER),
    ),
    Case(
        "rows without an adapter beside a tile", 192, (0, 0, 0, 0, 1, 1), ((0, 8), (1, 64)), (NEITHER, GATE), layers=3
    ),
    Case(
        "more pieces than are in flight", 64, tuple(range(1, 21)), ((20, 3), (1, 2), (0, 2), (7, 60)), (BOTH, NEITHER)
    ),
    Case("no slot has an adapter", 64, (1, 2), ((0, 66),), (BOTH, UP)),
)
"""Shapes that the kernel takes, small enough for the interpreter."""
