"""Finetuning jobs that both sides run: where they begin, what they see and how they step."""

from dataclasses import dataclass

import numpy as np

from flexjax.finetuning.data_order import DataOrder
from tests.parity.tiny_pair import ALL_MODULES, VOCABULARY

STEPS = 6


@dataclass(frozen=True)
class Case:
    """Attributes:
    model: name of the model.
    adapter: PEFT's LoraConfig of the adapter to start from; None where the job makes a fresh one.
    settings: of the job and of the loop in torch.
    fresh: arguments of the job that say what a fresh adapter is.
    """

    model: str
    adapter: dict | None
    settings: dict
    fresh: dict | None = None


COSINE = dict(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine", warmup_steps=2, batch_size=5)

CASES = {
    "all_modules": Case("llama", dict(r=4, lora_alpha=8, target_modules=ALL_MODULES), COSINE),
    "rslora": Case(
        "qwen2",
        dict(r=5, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]),
        COSINE | dict(learning_rate=2e-3, max_grad_norm=None, schedule="linear", warmup_steps=0, batch_tokens=300),
    ),
    "some_layers": Case(
        "qwen2",
        dict(
            r=2,
            lora_alpha=3,
            target_modules=["k_proj", "down_proj"],
            layers_to_transform=[1, 2],
            rank_pattern={"down_proj": 4},
            alpha_pattern={"down_proj": 6},
        ),
        COSINE | dict(learning_rate=5e-3, weight_decay=0.3, max_grad_norm=1.0, warmup_steps=1, batch_size=3),
    ),
    "unequal_scales": Case(
        "llama",
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3}),
        COSINE,
    ),
    "fresh": Case(
        "llama",
        None,
        COSINE | dict(weight_decay=0.0, max_grad_norm=0.1, schedule="constant", warmup_steps=0, batch_size=4),
        dict(rank=3, alpha=5, use_rslora=True, target_modules=("k_proj", "gate_proj"), seed=0),
    ),
}


def row(number: int, length: int, spans: list[tuple[int, int]]) -> dict:
    """A sequence whose targets are the tokens in ``spans``."""
    mask = np.zeros(length, int)
    for start, end in spans:
        mask[start:end] = 1
    ids = np.random.default_rng(number).integers(0, VOCABULARY, length)
    return {"input_ids": ids.tolist(), "loss_mask": mask.tolist()}


ROWS = [
    row(0, 5, [(0, 5)]),  # every token, the first too, which nothing predicts
    row(1, 130, [(20, 50), (100, 130)]),
    row(2, 64, [(32, 64)]),
    row(3, 66, [(65, 66)]),  # one target, at the end
    row(4, 40, [(3, 9)]),  # nothing after the targets counts
    row(5, 200, [(120, 190)]),
    row(6, 17, [(1, 17)]),
    row(7, 90, [(60, 80)]),
]


def groups_of(settings: dict) -> list[list[dict]]:
    """The rows of each optimizer step; the order is the job's own, since another one would be another training."""
    sizes = {"batch_size": settings.get("batch_size", 8), "batch_tokens": settings.get("batch_tokens")}
    computed = [max(index for index, trained in enumerate(each["loss_mask"]) if trained) for each in ROWS]
    order = DataOrder([-(-each // 64) * 64 for each in computed], seed=0, epochs=1, max_steps=STEPS, **sizes)
    return [[ROWS[index] for index in order.group(step)] for step in range(STEPS)]
