"""Named cases of the window's attention gradient: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.random_values import normal

PAGE = 64


@dataclass(frozen=True)
class Case:
    """One window of a microbatch.

    Attributes:
        lengths: tokens of every packed sequence; each starts at a block of its own.
        blocks: blocks of the microbatch; those past the last sequence are padding.
        first_block, window_blocks: the window.
        layers: layers of the pool; the last one is read.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_size: int
    lengths: tuple[int, ...]
    blocks: int
    first_block: int
    window_blocks: int
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int, unused: float = float("nan")) -> dict:
        """Keyword arguments of ``window_attention_grad``.

        Rows of the pool that hold no token are ``unused``; queries that are no token have a cotangent of 0. ``lse`` is
        near what the scores of random q and k give, so that weights are of ordinary size.
        """
        random = np.random.default_rng(seed)
        pages, tokens = self.blocks + 2, self.window_blocks * PAGE
        tables = random.permutation(pages)[: self.blocks].astype(np.int32)
        starts, used = self._pack()
        owned = np.zeros((pages, PAGE), bool)
        owned[tables] = used.reshape(self.blocks, PAGE)
        slots = self.first_block * PAGE + np.arange(tokens)
        seen_keys = slots - starts[slots // PAGE] * PAGE + 1
        pool = normal(random, (self.layers, pages, PAGE, 2 * self.kv_heads * self.head_size), self.dtype)
        pool[:, ~owned] = unused
        shape, sums = (tokens, self.query_heads, self.head_size), (self.blocks * PAGE, self.kv_heads, self.head_size)
        d_out = normal(random, shape, self.dtype)
        d_out[~used[slots]] = 0
        return {
            "q": normal(random, shape, self.dtype),
            "out": normal(random, shape, self.dtype),
            "lse": np.tile(np.log(seen_keys)[:, None] + 0.5, self.query_heads).astype(np.float32),
            "d_out": d_out,
            "pool": pool,
            "layer": np.int32(self.layers - 1),
            "tables": tables,
            "block_starts": starts,
            "first_block": np.int32(self.first_block),
            "d_k": normal(random, sums, "float32"),
            "d_v": normal(random, sums, "float32"),
            "kv_heads": self.kv_heads,
            "scale": self.head_size**-0.5,
        }

    def _pack(self) -> tuple[np.ndarray, np.ndarray]:
        """First block of the sequence of every block [blocks], and which slots hold a token [blocks * page]."""
        starts, used, block = np.arange(self.blocks), np.zeros(self.blocks * PAGE, bool), 0
        for length in self.lengths:
            end = block + -(-length // PAGE)
            starts[block:end] = block
            used[block * PAGE : block * PAGE + length] = True
            block = end
        return starts.astype(np.int32), used


def last_window(model: ModelShape, window: int, context: int, **options) -> Case:
    """The last ``window`` tokens of one sequence of ``context`` tokens."""
    name = f"last window {model.name} {window} of {context}"
    blocks, window_blocks = context // PAGE, window // PAGE
    heads = (model.query_heads, model.kv_heads, model.head_size)
    return Case(name, *heads, (context,), blocks, blocks - window_blocks, window_blocks, layers=1, **options)


LARGE = (
    last_window(LLAMA_3_1_8B, 256, 4096),
    last_window(LLAMA_3_1_8B, 512, 4096),
    last_window(LLAMA_3_1_8B, 2048, 4096),
    last_window(QWEN_2_5_7B, 512, 4096),
    last_window(SMOLLM2_135M, 256, 256),
    last_window(SMOLLM2_135M, 256, 1024),
)
"""Shapes worth timing."""

PACKED = (130, 64, 1, 65)
"""Four sequences in 7 blocks: 3, 1, 1 and 2."""

SMALL = (
    last_window(STORIES_260K, 64, 192),
    Case("packed, first window, group of 1", 2, 2, 8, PACKED, 9, 0, 2, dtype="float32"),
    Case("packed, second window, group of 3", 9, 3, 64, PACKED, 9, 2, 2),
    Case("packed, window of whole sequences, group of 4", 8, 2, 16, PACKED, 9, 3, 4, dtype="float32"),
    Case("packed, window half padding, group of 7", 7, 1, 16, PACKED, 9, 6, 3, dtype="float32"),
    Case("window of padding", 4, 2, 8, PACKED, 9, 7, 2, dtype="float32"),
    Case("whole microbatch", 4, 2, 8, PACKED, 7, 0, 7, dtype="float32"),
    Case("one block", 4, 2, 8, (1,), 1, 0, 1, dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""
