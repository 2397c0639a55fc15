"""Bound: finetuning tokens per second that conservation of FLOPs and bytes leaves beside a trace.

What must be computed and read is counted in closed form; the ceilings are measured. Requests need, per second,

    products    2 FLOPs per weight and token; the head for tokens that are sampled only
    attention   4 FLOPs per head, value of it, token and token before
    K/V         read once for every token that decodes

and a finetuning token needs 4 FLOPs per weight (forward, and the gradient of the input; frozen weights have none) and
attention three times (forward once, its gradient twice). Reading the weights costs requests nothing here: where
finetuning fills every iteration, the same read serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flexjax.bench.ceilings import Ceilings
from flexjax.bench.coserve_trace import TraceRow
from flexjax.bench.step_model import layer_parameters, product_parameters
from flexjax.models.config import ModelConfig

FORWARD, FORWARD_AND_INPUT_GRADIENT, ATTENTION_PASSES = 2, 4, 3


@dataclass(frozen=True)
class Demand:
    """Attributes:
    flops, bytes: of the requests, per second.
    finetune_flops: of one finetuning token.
    """

    flops: float
    bytes: float
    finetune_flops: float

    def overlapping(self, ceilings: Ceilings) -> float:
        """Finetuning tokens per second if reading K/V hides behind products entirely: no way of running can beat it."""
        return max(0.0, ceilings.product - self.flops) / self.finetune_flops

    def taking_turns(self, ceilings: Ceilings) -> float:
        """The same if products wait while K/V is read, as kernels in one stream do."""
        left = 1 - self.flops / ceilings.product - self.bytes / ceilings.copy
        return max(0.0, left) * ceilings.product / self.finetune_flops


def demand(
    model: ModelConfig, rows: Sequence[TraceRow], seconds: float, lengths: Sequence[int], itemsize: int
) -> Demand:
    """Of requests that arrive, and are served, in so many seconds, beside finetuning on sequences of these lengths."""
    layers, every = model.num_layers * layer_parameters(model), product_parameters(model)
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    per_position = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
    prompts, outputs = (sum(getattr(row, name) for row in rows) for name in ("prompt", "output"))
    read = sum(decoded_pairs(row) for row in rows)
    pairs = sum(row.prompt**2 / 2 for row in rows) + read
    mean_context = sum(length**2 for length in lengths) / 2 / sum(lengths)
    return Demand(
        flops=(FORWARD * (prompts * layers + outputs * every) + per_pair * pairs) / seconds,
        bytes=per_position * read / seconds,
        finetune_flops=FORWARD_AND_INPUT_GRADIENT * every + ATTENTION_PASSES * per_pair * mean_context,
    )


def decoded_pairs(row: TraceRow) -> float:
    """Sum over the answer's tokens of the tokens before each."""
    return row.output * (row.prompt + row.output / 2)
