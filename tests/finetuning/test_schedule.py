"""Learning rates equal transformers' closed forms."""

import math

import pytest

from flexjax.finetuning.job import FinetuneJob
from flexjax.finetuning.schedule import learning_rate

FALL = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


@pytest.mark.parametrize("schedule", FALL)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 20), (5, 5), (9, 4)])
def test_rate_of_every_step(schedule, warmup, total):
    rate = learning_rate(FinetuneJob("a", "d", schedule=schedule, warmup_steps=warmup, learning_rate=3e-4), total)
    for step in range(total):
        wanted = step / warmup if step < warmup else FALL[schedule]((step - warmup) / max(1, total - warmup))
        assert rate(step) == pytest.approx(3e-4 * wanted, rel=1e-6, abs=1e-11)  # optax computes in float32
