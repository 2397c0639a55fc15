"""Named cases of the row product: the four products of a layer for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, ModelShape
from pallas_kernels.random_values import normal


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``inputs`` values times one of ``layers`` matrices [inputs, outputs]."""

    name: str
    rows: int
    inputs: int
    outputs: int
    residual: bool = False
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Arguments of ``row_product``; the sums are near 1, as the residual is."""
        random = np.random.default_rng(seed)
        return {
            "x": normal(random, (self.rows, self.inputs), self.dtype),
            "weights": normal(random, (self.layers, self.inputs, self.outputs), self.dtype, self.inputs**-0.5),
            "layer": np.int32(self.layers - 1),
            "residual": normal(random, (self.rows, self.outputs), self.dtype) if self.residual else None,
        }


def products(model: ModelShape, rows: int) -> tuple[Case, ...]:
    """The products of one layer for this many rows."""
    attention = model.query_heads * model.head_size
    qkv = attention + 2 * model.kv_heads * model.head_size
    case = lambda name, *sizes, **options: Case(f"{name} {model.name}, {rows} rows", rows, *sizes, **options)
    return (
        case("qkv", model.hidden, qkv),
        case("o", attention, model.hidden, residual=True),
        case("gate_up", model.hidden, 2 * model.feed_forward),
        case("down", model.feed_forward, model.hidden, residual=True),
    )


def low_rank(model: ModelShape, rows: int, rank: int) -> tuple[Case, ...]:
    """The A factors of one layer, those of modules that share their input side by side."""
    modules = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    inputs = {case.name.split()[0]: case.inputs for case in products(model, rows)}
    return tuple(
        Case(f"{name} A of rank {rank} {model.name}, {rows} rows", rows, inputs[name], count * rank)
        for name, count in modules.items()
    )


LARGE = tuple(
    case
    for model, rows in ((LLAMA_3_1_8B, 1), (LLAMA_3_1_8B, 8), (LLAMA_3_1_8B, 32), (LLAMA_3_1_8B, 64))
    for case in products(model, rows)
)
LARGE += (
    *products(QWEN_2_5_7B, 8),
    *products(SMOLLM2_135M, 8),
    *low_rank(LLAMA_3_1_8B, 64, 128),
    *low_rank(SMOLLM2_135M, 8, 48),
)
"""Shapes worth timing."""

SMALL = (
    Case("one row", 1, 128, 64),
    Case("rows that are no multiple of 8", 12, 192, 128, residual=True),
    Case("as many rows as fit, three layers", 64, 128, 192, residual=True, layers=3),
    Case("more steps than are in flight", 8, 1024, 64),
    Case("inputs that splits do not share evenly", 16, 448, 128, residual=True),
    Case("columns that 32 does not divide", 8, 128, 48),
)
"""Edges of the specification, cheap on a CPU and in the interpreter."""
