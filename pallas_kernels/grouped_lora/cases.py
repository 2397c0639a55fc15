"""Named cases of an adapter's gradients: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, ModelShape
from pallas_kernels.random_values import normal


@dataclass(frozen=True)
class Case:
    """The gradients of one adapter over ``slots`` slots.

    Attributes:
        widths: where several modules share the input, the share of the outputs that each has.
        keeps_h: the forward pass left ``scale * x a``.
        has_base: d_x is added to what other products left.
    """

    name: str
    slots: int
    inputs: int
    outputs: int
    rank: int
    dtype: str = "bfloat16"
    widths: tuple[int, ...] | None = None
    keeps_h: bool = False
    has_base: bool = False

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``grouped_lora_grad``."""
        random = np.random.default_rng(seed)
        ranks = self.rank * (len(self.widths) if self.widths else 1)
        arguments = {
            "x": normal(random, (self.slots, self.inputs), self.dtype),
            "d_y": normal(random, (self.slots, self.outputs), self.dtype),
            "a": normal(random, (self.inputs, ranks), self.dtype, self.inputs**-0.5),
            "b": normal(random, (self.rank, self.outputs), self.dtype, self.rank**-0.5),
            "scale": np.float32(1.5),
        }
        if self.keeps_h:
            h = 1.5 * arguments["x"].astype(np.float32) @ arguments["a"].astype(np.float32)
            arguments["h"] = h.astype(arguments["x"].dtype)
        if self.has_base:
            arguments["d_x_base"] = normal(random, (self.slots, self.inputs), self.dtype)
        if self.widths:
            arguments["widths"] = self.widths
        return arguments


def of_model(model: ModelShape, slots: int, rank: int = 16, **options) -> tuple[Case, ...]:
    """The products of one layer: modules that share their input together, and those with an input of their own."""
    d, ff, q, kv = model.hidden, model.feed_forward, model.query_heads * model.head_size, model.row_width // 2
    products = {"qkv": (d, (q, kv, kv)), "o": (q, (d,)), "gate up": (d, (ff, ff)), "down": (ff, (d,))}
    return tuple(
        Case(f"{model.name} {name}, {slots} slots", slots, inputs, sum(widths), rank, widths=widths, **options)
        for name, (inputs, widths) in products.items()
    )


def one_by_one(model: ModelShape, slots: int, rank: int = 16) -> tuple[Case, ...]:
    """The different shapes of one layer's modules, each alone, with what the forward pass left."""
    d, ff, q, kv = model.hidden, model.feed_forward, model.query_heads * model.head_size, model.row_width // 2
    modules = {"q": (d, q), "k": (d, kv), "gate": (d, ff), "down": (ff, d)}
    return tuple(
        Case(f"{model.name} {name} alone, {slots} slots", slots, inputs, outputs, rank, keeps_h=True)
        for name, (inputs, outputs) in modules.items()
    )


LARGE = (
    *one_by_one(LLAMA_3_1_8B, 2048),
    *of_model(LLAMA_3_1_8B, 2048, keeps_h=True, has_base=True),
    Case("llama-3.1-8b o alone", 512, 4096, 4096, 16),
    Case("qwen2.5-7b down", 512, QWEN_2_5_7B.feed_forward, QWEN_2_5_7B.hidden, 16),
    Case("smollm2-135m gate", 256, SMOLLM2_135M.hidden, SMOLLM2_135M.feed_forward, 16),
)
"""Shapes worth timing."""

SMALL = (
    Case("rank 8", 64, 24, 40, 8),
    Case("rank 16", 128, 40, 24, 16, dtype="float32"),
    Case("one slot", 1, 16, 8, 8, dtype="float32"),
    Case("two modules", 64, 24, 56, 8, dtype="float32", widths=(40, 16), keeps_h=True, has_base=True),
)
"""Edges of the specification, cheap on a CPU."""
