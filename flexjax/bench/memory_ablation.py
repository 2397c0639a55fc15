"""Ablation: activation memory of one finetuning sequence as each means to save it is added, counted, not measured.

The order is FlexLLM's (arXiv 2402.18789, section 8): nothing, graph pruning, rematerialization, token-level finetuning.

    nothing             what reverse-mode differentiation of each layer keeps (attention as one kernel, weights frozen),
                        and the float32 log-probabilities of the whole vocabulary
    pruning             of these, what the gradients of the adapters read; keys and values among it
    rematerialization   the leanest plan that recomputes at most `RECOMPUTED` of the FLOPs of a pass forward and back
    token-level         finetuning by windows: as before in whole pages, with those that a tape always has; the
                        log-probabilities of one window and a part of the vocabulary at a time, and what windows hand
                        on to those before them

A counted byte is one that outlives the layer that made it; weights, optimizer state and the temporaries of a layer are
not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from flexjax.bench.step_model import product_parameters
from flexjax.compiler.rematerialization import BackwardWork, TapePlan, all_plans, backward_work
from flexjax.layout import tiles_for
from flexjax.models.config import ModelConfig
from flexjax.state import Dimensions

RECOMPUTED = 0.3
FORWARD_AND_BACK = 4
"""FLOPs per weight and token."""

FLOAT32 = 4


@dataclass(frozen=True)
class AblationStep:
    """Attributes:
    kept: in words, for a reader.
    bytes: of all layers, for the whole sequence.
    """

    name: str
    kept: str
    bytes: int


def ablation(
    model: ModelConfig, modules: Sequence[str], tokens: int, dtype: str, *, rank: int, window: int, head_chunk: int
) -> list[AblationStep]:
    """The four steps for one sequence.

    Args:
        tokens: of the sequence; window: of a unit of token-level finetuning.
        head_chunk: columns of the vocabulary that its loss takes at a time.
    """
    work = backward_work(model, modules, dtype, rank=rank, mean_context=tokens // 2)
    plan, layers, size = lean_plan(work, model), model.num_layers, jnp.dtype(dtype).itemsize
    kv = 2 * model.num_kv_heads * model.head_dim
    logits, part = FLOAT32 * model.vocab_size, FLOAT32 * min(head_chunk, model.vocab_size)
    plain = layers * work.interior.autodiff_bytes + logits
    pruned = (layers - 1) * work.interior.pruned_bytes + work.lowest.pruned_bytes + layers * kv * size + logits
    lean = layers * (kept_bytes(work, plan) + kv * size) + logits
    handed_on = kv * FLOAT32 + model.hidden_size * size
    names = ", ".join(plan.names)
    return [
        AblationStep("nothing", "all that differentiation keeps", tokens * plain),
        AblationStep("pruning", f"{', '.join(work.interior.needed)}, k, v", tokens * pruned),
        AblationStep("rematerialization", f"{names}, k, v", tokens * lean),
        AblationStep(
            "token-level",
            f"{names}, k, v, by windows",
            paged_bytes(model, plan.names, tokens, dtype) + tokens * handed_on + min(window, tokens) * part,
        ),
    ]


def kept_bytes(work: BackwardWork, plan: TapePlan) -> int:
    """Of the plan's names themselves, per token and layer, without what pages round up."""
    return sum(cost.bytes for cost in work.interior.costs if cost.name in plan.names)


def paged_bytes(model: ModelConfig, tape: Sequence[str], tokens: int, dtype: str) -> int:
    """Of the pages of a sequence, whatever the engine's sizes: keys and values, tape, final hidden states."""
    sizes = dict(max_rows=1, context=64, pages=1, rank_capacity=8, adapters=1, microbatch=64, window=64)
    dims = Dimensions(model=model, dtype=jnp.dtype(dtype), tape=tuple(tape), **sizes)
    return dims.microbatch_pages(tiles_for(tokens)) * dims.page_bytes


def lean_plan(work: BackwardWork, model: ModelConfig) -> TapePlan:
    """The plan with the fewest bytes among those that recompute little."""
    most = RECOMPUTED * FORWARD_AND_BACK * product_parameters(model)
    return next(each for each in all_plans(work) if each.recompute_flops_per_token <= most)
