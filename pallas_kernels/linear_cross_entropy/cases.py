"""Named cases of head and loss: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.random_values import normal


@dataclass(frozen=True)
class Case:
    """``tokens`` tokens, ``ignored`` of them without a target, over ``vocabulary`` columns in chunks of ``chunk``."""

    name: str
    tokens: int
    ignored: int
    hidden: int
    vocabulary: int
    chunk: int
    transposed: bool
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``linear_cross_entropy``; logits are of the order of 1 to 10."""
        random = np.random.default_rng(seed)
        targets = random.integers(0, self.vocabulary, self.tokens)
        targets[random.permutation(self.tokens)[: self.ignored]] = -100
        shape = (self.vocabulary, self.hidden) if self.transposed else (self.hidden, self.vocabulary)
        return {
            "hidden": normal(random, (self.tokens, self.hidden), self.dtype),
            "head": normal(random, shape, self.dtype, 3 * self.hidden**-0.5),
            "targets": targets.astype(np.int32),
            "chunk": self.chunk,
            "transposed": self.transposed,
        }


def head_of(model: ModelShape, tokens: int, chunk: int, **options) -> Case:
    """The head of a model, a quarter of the tokens without a target."""
    name = f"head {model.name} {tokens} tokens, chunk {chunk}"
    return Case(name, tokens, tokens // 4, model.hidden, model.vocabulary, chunk, model.tied, **options)


LARGE = (
    head_of(LLAMA_3_1_8B, 512, 32768),
    head_of(LLAMA_3_1_8B, 2048, 32768),
    head_of(QWEN_2_5_7B, 512, 32768),
    head_of(SMOLLM2_135M, 256, 8192),
)
"""Shapes worth timing."""

SMALL = (
    head_of(STORIES_260K, 64, 128, dtype="float32"),
    head_of(STORIES_260K, 7, 200),
    Case("columns, last chunk shorter", 9, 2, 32, 101, 25, transposed=False, dtype="float32"),
    Case("columns, whole chunks, bfloat16", 65, 3, 32, 128, 64, transposed=False),
    Case("chunk larger than the vocabulary", 5, 0, 16, 37, 64, transposed=False, dtype="float32"),
    Case("chunks of one column", 3, 1, 16, 5, 1, transposed=True, dtype="float32"),
    Case("no token has a target", 4, 4, 16, 37, 16, transposed=True),
)
"""Edges of the specification, cheap on a CPU."""
