"""The learning rate of every optimizer step of a job, evaluated once on the host."""

from collections.abc import Callable

import numpy as np
import optax

from flexjax.finetuning.job import FinetuneJob


def learning_rate(job: FinetuneJob, total_steps: int) -> Callable[[int], float]:
    """A function of the optimizer step (from 0), as transformers' schedules have it.

    The rate rises from 0 over ``warmup_steps`` steps, the first of which therefore changes nothing, and then falls to
    0 at ``total_steps`` (cosine: half a period; linear), or stays (constant).
    """
    decay_steps = max(1, total_steps - job.warmup_steps)
    after_warmup = {
        "cosine": optax.cosine_decay_schedule(job.learning_rate, decay_steps),
        "linear": optax.linear_schedule(job.learning_rate, 0.0, decay_steps),
        "constant": optax.constant_schedule(job.learning_rate),
    }[job.schedule]
    warmup = optax.linear_schedule(0.0, job.learning_rate, max(1, job.warmup_steps))
    schedule = optax.join_schedules([warmup, after_warmup], [job.warmup_steps])
    table = np.broadcast_to(np.asarray(schedule(np.arange(total_steps)), np.float64), (total_steps,))
    return lambda step: float(table[min(step, total_steps - 1)])
